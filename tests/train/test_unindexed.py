"""Runs on shards without an index: their length is given in steps."""

from pathlib import Path

import pytest

from mmssl.config import parse_config
from mmssl.errors import UserError
from mmssl.train import train
from tests.helpers.http_servers import serve
from tests.helpers.tiny_runs import run_tree, write_pairs


@pytest.mark.parametrize("kind", ["pipe", "http"])
def test_a_run_of_steps_starts_without_an_index(tmp_path: Path, kind: str) -> None:
    """The output of a command, and a web server without index files: two steps train, epochs are refused."""
    shards = write_pairs(tmp_path)
    tree = run_tree(shards, tmp_path / "run", train__steps=2)
    tree["evaluate"] = {}
    with serve(shards) as url:
        tree["data"] |= {"train": f"pipe:cat {shards}/0.tar" if kind == "pipe" else f"{url}/{{0..1}}.tar"}
        tree["data"] |= {"allow_pipe": True}
        train(parse_config(tree, "test"))
        assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
        tree["train"] |= {"steps": None, "epochs": 1}
        with pytest.raises(UserError, match=r"set the length in train\.steps"):
            train(parse_config(tree | {"run_dir": str(tmp_path / "epochs")}, "test"))
