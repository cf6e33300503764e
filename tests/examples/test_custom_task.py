"""scripts/examples/custom_task.py, by the command line and from a configuration."""

import json
from pathlib import Path

import pytest
import torch

from mmssl.build import resolve
from mmssl.cli import main
from mmssl.config import parse_config
from mmssl.data.transforms import train_tokenizer
from mmssl.errors import UserError
from mmssl.evaluate.tasks import find_task, task_names
from mmssl.inference import Model
from mmssl.models.dual_encoder import build_dual_encoder
from tests.helpers.models import tiny_model_config
from tests.helpers.tiny_runs import run_tree, write_pairs
from tests.helpers.toy_encoder import pack, paint

EXAMPLES = Path(__file__).parents[2] / "scripts" / "examples"


@pytest.fixture
def counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight images with 1 or 2 objects; the user's folder is the current one."""
    monkeypatch.chdir(EXAMPLES)
    return pack(tmp_path / "counts.tar", [{"png": paint(i), "json": {"count": 1 + i % 2}} for i in range(8)])


def test_the_command_line_takes_the_path_of_a_task(counts: Path, tmp_path: Path) -> None:
    """`--task custom_task:Counting` measures, under the task's own name."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["a photo of 1 objects."], 64, 77)
    config = tiny_model_config()
    Model(build_dual_encoder(config, tokenizer.vocab_size, tokenizer.pad_id), tokenizer, config).save(tmp_path / "m")
    out = tmp_path / "found.json"
    arguments = ["eval", str(tmp_path / "m"), str(counts), "--task", "custom_task:Counting", "--json", str(out)]
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--device", "cpu", "--no-cache"])
    assert not caught.value.code
    (key, metrics), *others = json.loads(out.read_text()).items()
    assert not others
    assert key.endswith("/counting")
    assert metrics["samples"] == 8
    assert 0 <= metrics["acc1"] == 1 - metrics["mean_absolute_error"] <= 1


def test_a_configuration_takes_the_path_of_a_task(counts: Path, tmp_path: Path) -> None:
    """The plan of a run finds the task; a wrong name gives one line with the known ones, and where it stands."""
    write_pairs(tmp_path)
    suites = {"counts": {"data": str(counts), "task": "custom_task:Counting"}}
    tree = run_tree(tmp_path, tmp_path / "run", evaluate={"suites": suites})
    assert resolve(parse_config(tree, "c.yaml")).suites["counts"][1] == ["custom_task:Counting"]
    tree["evaluate"]["suites"]["counts"]["task"] = "counting"
    with pytest.raises(UserError, match=r"evaluate\.suites\.counts\.task: unknown task 'counting'.*zero_shot"):
        resolve(parse_config(tree, "c.yaml"))


def test_every_built_in_task_has_its_texts() -> None:
    """Its name is that of its module; label and description are for readers."""
    assert {"zero_shot", "retrieval", "knn"} <= set(task_names())
    for name in task_names():
        task = find_task(name)
        assert task.name == name
        assert task.label
        assert task.description.endswith(".")
