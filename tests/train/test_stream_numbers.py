"""What a run says of its stream: in metrics.jsonl and in the progress line."""

import json
from pathlib import Path

import pytest

from mmssl.build import train_tokenizer_on
from mmssl.config import parse_config
from mmssl.data.shards import SampleLimits, index_shards
from mmssl.train.trainer import train
from tests.helpers.http_servers import Mischief, serve
from tests.helpers.tars import tar_bytes
from tests.helpers.tiny_runs import run_tree, write_pairs


def test_metrics_and_progress_tell_what_the_stream_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Realised mixture, bad samples as written down, retries of a server that breaks off, speed and waiting."""
    for name in ("good", "bad"):
        (tmp_path / name).mkdir()
    good = write_pairs(tmp_path / "good")
    index_shards([str(path) for path in sorted(good.glob("*.tar"))], SampleLimits())
    half = [f for i in range(24) for f in ((f"{i}.jpg", b"junk"), (f"{i}.txt", b"a red square"))]
    (tmp_path / "bad" / "0.tar").write_bytes((good / "0.tar").read_bytes())
    (tmp_path / "bad" / "1.tar").write_bytes(tar_bytes(half))
    run = tmp_path / "run"
    # Learnt before, for learning it would read from the server as well.
    train_tokenizer_on([str(good / "0.tar")], ["{txt}"], 64, 77).save(tmp_path / "tokenizer")
    with serve(good, Mischief(cut=3, cut_after=1000)) as url:
        tree = run_tree(good, run, train__steps=6)
        sources = [{"shards": f"{url}/{{0,1}}.tar", "weight": 3}, {"shards": str(tmp_path / "bad"), "weight": 1}]
        tree["model"]["text"]["tokenizer"] = str(tmp_path / "tokenizer")
        tree["data"] |= {"train": sources, "bad_samples": 1.0}
        train(parse_config(tree, "test"))
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = records[-1]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert (last["source_0_share"], last["source_1_share"]) == (0.75, 0.25)
    assert all(record["mb_per_s"] > 0 for record in records)
    assert all(0 <= record["data_wait"] <= 1 for record in records)
    assert last["retries"] == 3
    named = [json.loads(line) for line in (run / "bad_samples.jsonl").read_text().splitlines()]
    assert len(named) == last["bad_samples"] > 0
    assert all(line["shard"].endswith("bad/1.tar") and "not a JPEG" in line["error"] for line in named)
    assert f"{last['bad_samples']} bad samples" in capsys.readouterr().err
