"""An evaluation never ends a training, and one that cannot work is refused before the first step."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from mmssl.config import Config, parse_config
from mmssl.errors import UserError
from mmssl.evaluate import Metrics, Task, TaskContext
from mmssl.train.trainer import train
from tests.helpers.tars import File, tar_bytes
from tests.helpers.tiny_runs import run_tree, write_pairs
from tests.helpers.uploads import image as noise

WEIGHTS = "checkpoints/step-000000006/model.safetensors"


class Failing(Task):
    """Fails as it is told, from the second evaluation on."""

    name = "failing"
    label = "failing"
    description = "Fails."
    error: ClassVar[Exception | None] = None
    runs: ClassVar[int] = 0

    def run(self, context: TaskContext) -> Metrics:
        """Measure nothing."""
        Failing.runs += 1
        if Failing.error is not None and Failing.runs > 1:
            raise Failing.error
        return {"value": 1.0}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 small images in two tars."""
    return write_pairs(tmp_path_factory.mktemp("shards"))


def config(shards: Path, run: Path, **evaluate: Any) -> Config:
    tree = run_tree(shards, run, train__steps=6, train__keep=9, evaluate={"every": 2, **evaluate})
    return parse_config(tree, "test")


@pytest.fixture(scope="module")
def plain(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that evaluates nothing."""
    run = tmp_path_factory.mktemp("runs") / "plain"
    train(config(shards, run, every=None))
    return run


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def held_out(folder: Path, samples: Sequence[Sequence[File]]) -> str:
    """A tar of samples of two classes; gives its path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "classnames.txt").write_text("red\nblue\n")
    (folder / "held-out.tar").write_bytes(tar_bytes([file for sample in samples for file in sample]))
    return str(folder / "held-out.tar")


def sample(
    key: str, image: bytes | None = None, text: bytes | None = b"a red one", label: bytes | None = b"0"
) -> list[File]:
    members = {"png": noise(8, 8) if image is None else image, "txt": text, "cls": label}
    return [(f"{key}.{name}", content) for name, content in members.items() if content is not None]


BAD = {
    "a broken image": ("broken", {"image": b"no image"}),
    "an empty image": ("empty", {"image": b""}),
    "an empty caption": ("silent", {"text": b""}),
    "a blank caption": ("blank", {"text": b" \n\n"}),
    "no caption": ("bare", {"text": None}),
    "no label": ("nameless", {"label": None}),
    "the label of no class": ("unlabelled", {"label": b"-1"}),
}


@pytest.mark.parametrize("batch_size", [1, 2, 4, 5, 256])
@pytest.mark.parametrize("tasks", ["zero_shot", "retrieval"])
def test_bad_samples_are_left_out_counted_and_named(
    tasks: str,
    batch_size: int,
    shards: Path,
    plain: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Broken images, empty captions and missing labels among the held-out samples, whatever the batches: the run ends
    with the weights of one that evaluates nothing, and the metrics are those of the good samples."""
    good = [sample(f"good-{i}", text=f"a red one {i}".encode(), label=str(i % 2).encode()) for i in range(4)]
    bad = [sample(key, **changes) for key, changes in BAD.values()]
    data = held_out(tmp_path / "mixed", [*bad[:3], *good[:2], *bad[3:], *good[2:]])
    run = tmp_path / "run"
    ended = train(config(shards, run, suites={"mixed": {"data": data, "task": tasks}}, batch_size=batch_size))
    assert (run / WEIGHTS).read_bytes() == (plain / WEIGHTS).read_bytes()
    (metrics,) = ended.results.values()
    kinds = ("image", "label") if tasks == "zero_shot" else ("image", "text")
    lost = [key for key, changes in BAD.values() if set(changes) & set(kinds)]
    assert metrics["bad_samples"] == len(lost)
    assert f"{len(lost)} of {len(good) + len(bad)} samples are left out" in caplog.text
    assert any(key in caplog.text for key in lost)
    assert [row["step"] for row in rows(run / "evaluations.jsonl")] == [2, 4, 6]
    assert ["failed" in row for row in rows(run / "evaluations.jsonl")] == [False] * 3


@pytest.mark.parametrize(
    "error",
    [
        UserError("the shard is gone; restore it"),
        ValueError("of another library"),
        OSError(28, "no space left on device"),
        torch.OutOfMemoryError("tried to allocate"),
        RecursionError("too deep"),
        AssertionError(),
    ],
)
def test_whatever_fails_in_an_evaluation_the_training_goes_on(
    error: Exception,
    shards: Path,
    plain: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second evaluation and the last fail: it is said each time and recorded, other evaluations are measured, and
    the weights and the model are those of a run that evaluates nothing."""
    monkeypatch.setattr(Failing, "error", error)
    monkeypatch.setattr(Failing, "runs", 0)
    run, data = tmp_path / "run", str(shards / "*.tar")
    task = f"{__name__}:Failing"
    suites = {"first": {"data": data, "task": task}, "second": {"data": data, "task": "retrieval"}}
    ended = train(config(shards, run, suites=suites))
    assert ended.signal is None
    assert list(ended.results) == ["second/retrieval"]
    assert (run / WEIGHTS).read_bytes() == (plain / WEIGHTS).read_bytes()
    assert (run / "model" / "model.safetensors").read_bytes() == (plain / "model" / "model.safetensors").read_bytes()
    found = rows(run / "evaluations.jsonl")
    assert [list(row.get("failed", {})) for row in found] == [[], ["first/failing"], ["first/failing"]]
    said = capfd.readouterr().err
    for step in (4, 6):
        assert f"error: the evaluation first/failing at step {step} failed: " in said
    assert "Traceback" not in said


def test_the_best_step_is_that_of_the_evaluations_that_worked(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default metric is the first suite's; where it failed, another suite's does not take its place."""
    monkeypatch.setattr(Failing, "error", ValueError("x"))
    monkeypatch.setattr(Failing, "runs", 0)
    run, data = tmp_path / "run", str(shards / "*.tar")
    suites = {"first": {"data": data, "task": f"{__name__}:Failing"}, "second": {"data": data, "task": "retrieval"}}
    train(config(shards, run, suites=suites))
    state = json.loads((run / "checkpoints" / "step-000000006" / "state.json").read_text())
    assert state["best"] == [1.0, 2]


def test_a_metric_that_is_not_measured_ends_nothing(
    shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is named with those that are measured."""
    suites = {"colors": {"data": str(shards / "*.tar"), "task": "retrieval"}}
    ended = train(config(shards, tmp_path / "run", suites=suites, best="colors/retrieval/accuracy"))
    assert ended.signal is None
    said = capfd.readouterr().err
    assert "error: evaluate.best='colors/retrieval/accuracy' is not measured; choose one of: colors/retrieval/" in said


@pytest.mark.parametrize(
    ("samples", "task", "said"),
    [
        ([], "zero_shot", "no sample to evaluate"),
        ([sample("a", label=None), sample("b", label=None)], "zero_shot", "a in .* has no label"),
        ([sample("a", label=b"-1")], "zero_shot", "a in .*: label -1 marks"),
        ([sample("a", label=b"7")], "zero_shot", "label 7 of a in .* does not fit the 2 class names"),
        ([sample("a", text=b""), sample("b", text=None)], "retrieval", "a in .* has no caption"),
    ],
)
def test_what_no_evaluation_can_use_is_refused_before_the_first_step(
    samples: list[list[File]], task: str, said: str, shards: Path, tmp_path: Path
) -> None:
    """The suites are opened and their beginning is read once; nothing is written."""
    data = held_out(tmp_path / "bad", samples)
    with pytest.raises(UserError, match=said):
        train(config(shards, tmp_path / "run", suites={"bad": {"data": data, "task": task}}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("best", ["colors/zero_shot/acc1", "other/retrieval/r", "acc1", "colors"])
def test_a_best_metric_of_no_evaluation_is_refused(best: str, shards: Path, tmp_path: Path) -> None:
    """Before the first step, with the evaluations there are."""
    suites = {"colors": {"data": str(shards / "*.tar"), "task": "retrieval"}}
    with pytest.raises(UserError, match=r"names no evaluation of this run; .*: colors/retrieval"):
        train(config(shards, tmp_path / "run", suites=suites, best=best))
    assert not (tmp_path / "run").exists()
