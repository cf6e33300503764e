"""The guard: a run that forgets what a suite measures stops, or learns more slowly."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import mmssl
from mmssl.build import RunPlan
from mmssl.config import Config, parse_config
from mmssl.errors import UserError
from mmssl.train.held_out import HeldOut
from mmssl.train.state import RunState
from mmssl.train.trainer import train
from tests.helpers.scripted_tasks import GUARDED, SCRIPTED, Guarded, Scripted
from tests.helpers.tiny_runs import run_tree, write_pairs

MISSING: Any = None
"""A dataset that is not read."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 small images in two tars."""
    return write_pairs(tmp_path_factory.mktemp("shards"))


def config(shards: Path, run: Path, guard: dict[str, Any] | None, **changes: Any) -> Config:
    data = str(shards / "*.tar")
    suites = {"new": {"data": data, "task": SCRIPTED}, "old": {"data": data, "task": GUARDED}}
    changes = {"evaluate": {"suites": suites, "every": 2}, "train__steps": 8, "train__ema": None, **changes}
    guard = None if guard is None else {"suite": "old", **guard}
    return parse_config(run_tree(shards, run, **changes, train__guard=guard), "test")


def script(monkeypatch: pytest.MonkeyPatch, new: list[float], old: list[float]) -> None:
    """The values of the suites, in the order of the evaluations."""
    monkeypatch.setattr(Scripted, "values", list(new))
    monkeypatch.setattr(Guarded, "values", list(old))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_model_is_of(step: int, run: Path) -> None:
    weights = load_file(run / "checkpoints" / f"step-{step:09d}" / "model.safetensors")
    model = mmssl.load(run).encoder.state_dict()
    assert all((tensor == weights[f"encoder.{name}"]).all() for name, tensor in model.items())


@pytest.mark.parametrize("settings", [{"drop": 0.1}, {"floor": 0.45}])
def test_a_run_that_forgets_ends_with_its_best_step_above_the_floor(
    settings: dict[str, Any],
    shards: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The suite is evaluated before the first step too. At step 6 it is below nine tenths of its first value: the run
    ends, and its model is that of step 2, which is better than step 4 and, unlike step 6, above the floor."""
    script(monkeypatch, new=[0.1, 0.4, 0.3, 0.9, 0.4], old=[0.5, 0.46, 0.48, 0.44, 0.46])
    run = tmp_path / "run"
    train(config(shards, run, settings))
    assert [row["step"] for row in lines(run / "evaluations.jsonl")] == [0, 2, 4, 6]
    assert lines(run / "metrics.jsonl")[-1]["step"] == 6
    assert_model_is_of(2, run)
    found = json.loads((run / "best.json").read_text())
    assert (found["best"], found["exported_step"], found["ended_early"]) == ({"step": 2, "value": 0.4}, 2, True)
    assert found["guard"] == {
        "metric": "old/guarded/value",
        "start": 0.5,
        "last": 0.44,
        "floor": 0.45,
        "fallen": True,
        "lr_factor": 1.0,
    }
    said = capfd.readouterr().err
    assert "guard: old/guarded/value is 0.5 at step 0; the floor is 0.45" in said
    assert "is 0.44 at step 6, below the floor of 0.45 (it began at 0.5): the run ends" in said
    assert "the model is that of step 2, the best one above the guard's floor" in said


def test_a_run_that_only_forgets_ends_with_its_start(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below the floor at the first evaluation after the start: the model is that of step 0."""
    script(monkeypatch, new=[0.1, 0.4, 0.1], old=[0.5, 0.3, 0.5])
    run = tmp_path / "run"
    train(config(shards, run, {"drop": 0.1}))
    assert_model_is_of(0, run)


def test_a_run_above_the_floor_is_the_one_without_a_guard(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The evaluation before the first step changes nothing: losses and the exported model of the last step are equal to
    the bit."""
    script(monkeypatch, new=[0.1] * 10, old=[0.5] * 10)
    train(config(shards, tmp_path / "guarded", {"drop": 0.0}))
    train(config(shards, tmp_path / "plain", None))
    losses = [[row["loss"] for row in lines(tmp_path / name / "metrics.jsonl")] for name in ("guarded", "plain")]
    assert losses[0] == losses[1]
    models = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("guarded", "plain")]
    assert models[0] == models[1]


@pytest.mark.parametrize("cut", [0, 2, 4, 6])
def test_the_rate_is_lowered_and_stays_so_in_a_resumed_run(
    cut: int, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below the floor at steps 2 and 6: from there on each rate is that of a run without guard times the factor, once
    and twice. Cut back to any checkpoint, the resumed run has the same rates, losses and model."""
    new, old = [0.1, 0.2, 0.3, 0.4, 0.5], [0.5, 0.4, 0.5, 0.4, 0.5]
    script(monkeypatch, new, old)
    run, settings = tmp_path / "run", {"drop": 0.1, "action": "lower_rate", "factor": 0.3}
    train(config(shards, run, settings, train__keep=9))
    script(monkeypatch, [0.1] * 9, [0.1] * 9)
    train(config(shards, tmp_path / "plain", None))
    rates = [[row["lr"] for row in lines(folder / "metrics.jsonl")] for folder in (run, tmp_path / "plain")]
    factors = [1.0, 1.0, 0.3, 0.3, 0.3, 0.3, 0.09, 0.09]
    assert rates[0] == pytest.approx([rate * factor for rate, factor in zip(rates[1], factors, strict=True)])
    cut_run = tmp_path / "cut"
    shutil.copytree(run, cut_run)
    for path in (cut_run / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > cut:
            shutil.rmtree(path)
    script(monkeypatch, new[cut // 2 + 1 :], old[cut // 2 + 1 :])
    train(config(shards, cut_run, settings, train__keep=9), resume=True)
    for name in ("model/model.safetensors", "best.json"):
        assert (cut_run / name).read_bytes() == (run / name).read_bytes()
    assert [row["lr"] for row in lines(cut_run / "metrics.jsonl")] == rates[0]


def test_a_floor_above_the_start_is_refused(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first step, with both values."""
    script(monkeypatch, new=[0.1], old=[0.3])
    with pytest.raises(UserError, match=r"old/guarded/value is 0.3 before the first step, below its floor of 0.5"):
        train(config(shards, tmp_path / "run", {"floor": 0.5}))


@pytest.mark.parametrize(
    ("guard", "said"),
    [
        ({}, "needs one of drop"),
        ({"drop": 0.1, "floor": 0.3}, "needs one of drop"),
        ({"drop": 0.1, "suite": "other"}, "'other' is none of evaluate.suites: new, old"),
        ({"drop": 0.1, "metric": "zero_shot/acc1"}, "names no task of the suite old; .*: guarded"),
    ],
)
def test_guards_that_cannot_work_are_refused(guard: dict[str, Any], said: str, shards: Path, tmp_path: Path) -> None:
    """With what is missing, and what there is."""
    with pytest.raises(UserError, match=said):
        train(config(shards, tmp_path / "run", guard))
    assert not (tmp_path / "run").exists()


def test_a_guard_needs_evaluations(tmp_path: Path) -> None:
    """The missing key is named."""
    tree = run_tree(tmp_path, tmp_path / "run", train__guard={"suite": "colors", "drop": 0.1})
    with pytest.raises(UserError, match=r"train.guard needs evaluations .* evaluate.every is not set"):
        parse_config(tree, "test")


@given(
    st.lists(st.one_of(st.none(), st.floats(0, 1), st.just(float("nan"))), min_size=1, max_size=8),
    st.sampled_from([0.0, 0.1, 0.5]),
    st.sampled_from(["acc1", "median_rank"]),
)
def test_falls_are_those_of_a_loop(values: list[float | None], drop: float, metric: str) -> None:
    """A value has fallen if it is worse than the first one by more than `drop` of it, in the metric's own direction, or
    no number; evaluations that failed (None) change nothing. The rate is lowered once per fall."""
    evaluate = {"suites": {"old": {"data": "x"}}, "every": 1}
    guard = {"suite": "old", "metric": f"zero_shot/{metric}", "drop": drop, "action": "lower_rate"}
    tree = run_tree(Path("x"), Path("y"), evaluate=evaluate, train__guard=guard)
    run = RunState()
    suites = {"old": (MISSING, ["zero_shot"])}
    held_out = HeldOut(RunPlan(parse_config(tree, "test"), [], {}, suites), run, lambda _: None)
    start, falls, fallen = None, 0, False
    for step, value in enumerate(values, 1):
        run.step = step
        held_out.follow({} if value is None else {"old/zero_shot": {metric: value}})
        if value is not None:
            start = value if start is None else start
            kept = value >= start * (1 - drop) if metric == "acc1" else value <= start * (1 + drop)
            fallen, falls = not kept, falls + (not kept)
        assert held_out.fallen == fallen
        assert run.watch.rate == 0.5**falls
