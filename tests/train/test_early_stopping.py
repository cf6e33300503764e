"""Early stopping: a run ends when its held-out metric no longer improves, and exports its best step."""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

import mmssl
from mmssl.apps.report import write_card
from mmssl.build import RunPlan
from mmssl.config import Config, parse_config
from mmssl.errors import UserError
from mmssl.train.held_out import HeldOut
from mmssl.train.state import RunState
from mmssl.train.trainer import train
from tests.helpers.scripted_tasks import SCRIPTED, Scripted
from tests.helpers.tiny_runs import run_tree, write_pairs

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 small images in two tars."""
    return write_pairs(tmp_path_factory.mktemp("shards"))


@pytest.fixture(autouse=True)
def _nothing_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scripted, "meanwhile", None)


def config(shards: Path, run: Path, stopping: dict[str, Any] | None = None, **changes: Any) -> Config:
    suites = {"held_out": {"data": str(shards / "*.tar"), "task": SCRIPTED}}
    changes = {"evaluate": {"suites": suites, "every": 2}, "train__steps": 20, **changes}
    return parse_config(run_tree(shards, run, **changes, train__early_stopping=stopping), "test")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def read(path: Path) -> Any:
    return json.loads(path.read_text())


MISSING: Any = None
"""A dataset that is not read."""


def followed(values: Sequence[float], metric: str, patience: int, min_delta: float) -> tuple[int, int | None]:
    """Number of evaluations until a run ends (or all), and the index of its best one."""
    evaluate = {"suites": {"a": {"data": "x"}}, "every": 1}
    stopping = {"metric": f"a/zero_shot/{metric}", "patience": patience, "min_delta": min_delta}
    tree = run_tree(Path("x"), Path("y"), evaluate=evaluate, train__early_stopping=stopping)
    run = RunState()
    plan = RunPlan(parse_config(tree, "test"), [], {}, {"a": (MISSING, ["zero_shot"])})
    held_out = HeldOut(plan, run, lambda _: None)
    for step, value in enumerate(values, 1):
        run.step = step
        held_out.follow({"a/zero_shot": {metric: value}})
        if held_out.ended:
            break
    return run.step, None if run.best is None else run.best[1] - 1


VALUES = st.lists(st.sampled_from([0.0, 0.1, 0.2, 0.3, 0.4, float("nan")]), min_size=1, max_size=12)


@given(VALUES, st.integers(1, 4), st.sampled_from(["acc1", "median_rank"]))
def test_the_end_is_that_of_transformers(values: list[float], patience: int, metric: str) -> None:
    """Without `min_delta` a run ends where transformers' EarlyStoppingCallback ends one, higher or lower being
    better."""
    values = [value for value in values if value == value]
    better = metric == "acc1"
    arguments = TrainingArguments(metric_for_best_model="m", greater_is_better=better, use_cpu=True, report_to=[])
    callback, state, control = EarlyStoppingCallback(patience), TrainerState(), TrainerControl()
    expected = 0
    for value in values:
        expected += 1
        callback.on_evaluate(arguments, state, control, {"eval_m": value})
        # The trainer itself keeps the best value, after the callbacks.
        if state.best_metric is None or (value > state.best_metric if better else value < state.best_metric):
            state.best_metric = value
        if control.should_training_stop:
            break
    if values:
        assert followed(values, metric, patience, 0.0)[0] == expected


@given(VALUES, st.integers(1, 4), st.sampled_from([0.0, 0.15, 0.35]), st.sampled_from(["acc1", "median_rank"]))
def test_the_best_step_and_the_end_are_those_of_a_loop(
    values: list[float], patience: int, min_delta: float, metric: str
) -> None:
    """The best evaluation is the first of the best numbers up to the end. The end comes `patience` evaluations after
    the last that exceeded the one before it that counted by more than `min_delta`; NaN never counts."""
    signed = [value if metric == "acc1" else -value for value in values]
    counted: list[int] = []
    end = len(values)
    for i, value in enumerate(signed):
        if value == value and (not counted or value - signed[counted[-1]] > min_delta):
            counted.append(i)
        if i - (counted[-1] if counted else -1) >= patience:
            end = i + 1
            break
    numbers = [value for value in signed[:end] if value == value]
    best = signed.index(max(numbers)) if numbers else None
    assert followed(values, metric, patience, min_delta) == (end, best)


def test_a_run_ends_early_and_exports_its_best_step(
    shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The metric peaks at step 4 and is not reached in the two evaluations after it: the run ends at step 8 and says
    why; the model has the averaged weights of step 4's checkpoint, which outlived newer ones; results.json has its
    metrics, best.json both steps, and the card says whose weights they are."""
    monkeypatch.setattr(Scripted, "values", [0.1, 0.3, 0.2, 0.3, 0.25])
    run = tmp_path / "run"
    ended = train(config(shards, run, {"patience": 2}, train__keep=1, train__checkpoint_steps=1))
    assert ended.signal is None
    assert lines(run / "metrics.jsonl")[-1]["step"] == 8
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-000000004", "step-000000008"}
    weights = load_file(run / "checkpoints" / "step-000000004" / "model.safetensors")
    model = mmssl.load(run).encoder.state_dict()
    assert all((tensor == weights[f"ema.{name}"]).all() for name, tensor in model.items())
    rows = lines(run / "evaluations.jsonl")
    assert [(row["step"], row["best"]) for row in rows] == [(2, True), (4, True), (6, False), (8, False)]
    # The fifth value is that of the best weights, measured again for the tables.
    assert read(run / "results.json") == ended.results == {"held_out/scripted": {"value": 0.25}}
    assert read(run / "best.json") == {
        "metric": "held_out/scripted/value",
        "best": {"step": 4, "value": 0.3},
        "last": {"step": 8, "value": 0.3},
        "exported_step": 4,
        "ended_early": True,
    }
    said = capfd.readouterr().err
    assert "early stopping at step 8: held_out/scripted/value has not improved on 0.3 in 2 evaluations" in said
    assert "the model is that of step 4, the best one: held_out/scripted/value was 0.3 there, and 0.3 at" in said
    assert "The weights are those of step 4, the best by held_out/scripted/value: 0.3" in write_card(run).read_text()


def test_a_run_that_reaches_its_end_exports_its_best_step(
    shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With patience left at the end, the model is that of the best step, be it an earlier one or the last."""
    expected = {4: [0.1, 0.4, 0.3, 0.4], 6: [0.1, 0.2, 0.3]}
    for best, values in expected.items():
        monkeypatch.setattr(Scripted, "values", list(values))
        run = tmp_path / f"best-{best}"
        train(config(shards, run, {"patience": 3}, train__steps=6, train__ema=None))
        weights = load_file(run / "checkpoints" / f"step-00000000{best}" / "model.safetensors")
        model = mmssl.load(run).encoder.state_dict()
        assert all((tensor == weights[f"encoder.{name}"]).all() for name, tensor in model.items())
        found = read(run / "best.json")
        assert (found["best"]["step"], found["exported_step"], found["ended_early"]) == (best, best, False)
        assert ("the model is that of step" in capfd.readouterr().err) == (best == 4)


def test_without_early_stopping_the_last_step_is_exported_beside_the_best(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """best.json names both; the model is that of the last step."""
    monkeypatch.setattr(Scripted, "values", [0.4, 0.3, 0.2])
    run = tmp_path / "run"
    train(config(shards, run, train__steps=6))
    found = read(run / "best.json")
    assert (found["best"]["step"], found["last"]["step"], found["exported_step"]) == (2, 6, 6)
    weights = load_file(run / "checkpoints" / "step-000000006" / "model.safetensors")
    model = mmssl.load(run).encoder.state_dict()
    assert all((tensor == weights[f"ema.{name}"]).all() for name, tensor in model.items())


@pytest.mark.parametrize("cut", [2, 4, 6, 8])
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(
    cut: int, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut back to any evaluated checkpoint, it counts on: the same end, model and logs, also from the last one, whose
    run has nothing left to train."""
    values = [0.3, 0.1, 0.2, 0.1, 0.3]
    monkeypatch.setattr(Scripted, "values", list(values))
    whole, run = tmp_path / "whole", tmp_path / "run"
    settings = {"stopping": {"patience": 3}, "train__keep": 9}
    train(config(shards, whole, **settings))
    shutil.copytree(whole, run)
    shutil.rmtree(run / "model")
    for path in (run / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > cut:
            shutil.rmtree(path)
    monkeypatch.setattr(Scripted, "values", values[cut // 2 :])
    train(config(shards, run, **settings), resume=True)
    for name in ("model/model.safetensors", "best.json", "results.json"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()
    rows = [[(r["step"], r["best"], r["results"]) for r in lines(f / "evaluations.jsonl")] for f in (run, whole)]
    assert rows[0] == rows[1]


def test_more_patience_goes_on_with_a_run_that_ended(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resumed with a higher patience, a run that ended early trains on, and may find a better step."""
    monkeypatch.setattr(Scripted, "values", [0.3, 0.1, 0.3])
    run = tmp_path / "run"
    train(config(shards, run, {"patience": 1}))
    assert read(run / "best.json")["last"]["step"] == 4
    monkeypatch.setattr(Scripted, "values", [0.2, 0.5, 0.1, 0.1, 0.1, 0.5])
    train(config(shards, run, {"patience": 3}), resume=True)
    found = read(run / "best.json")
    assert (found["best"], found["last"]["step"]) == ({"step": 8, "value": 0.5}, 14)


def test_evaluations_that_fail_do_not_use_up_the_patience(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing was measured, so nothing is decided: the run goes on to its end."""
    monkeypatch.setattr(Scripted, "values", [])  # every evaluation raises IndexError
    run = tmp_path / "run"
    train(config(shards, run, {"patience": 1}, train__steps=6))
    assert lines(run / "metrics.jsonl")[-1]["step"] == 6
    assert not (run / "best.json").exists()


def test_a_lost_best_checkpoint_is_said_and_the_last_step_exported(
    shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training is not lost with it."""
    run = tmp_path / "run"
    monkeypatch.setattr(Scripted, "values", [0.5, 0.1, 0.2])
    lost = run / "checkpoints" / "step-000000002"
    monkeypatch.setattr(Scripted, "meanwhile", lambda: shutil.rmtree(lost))
    train(config(shards, run, {"patience": 9}, train__steps=6))
    said = capfd.readouterr().err
    assert f"error: checkpoint {lost} is damaged" in said
    assert "the model is that of the last step" in said
    assert read(run / "best.json")["exported_step"] == 6


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"evaluate": {"every": 2}}, "evaluate.suites is not set"),
        ({"evaluate": {"suites": {"a": {"data": "x"}}}}, "evaluate.every is not set"),
        (
            {
                "evaluate": {"suites": {"a": {"data": "x"}}, "every": 2, "best": "a/zero_shot/acc1"},
                "train__early_stopping": {"metric": "a/zero_shot/acc5"},
            },
            "name different metrics",
        ),
        ({"train__early_stopping": {"patience": 0}, "evaluate": {}}, "patience"),
        ({"train__early_stopping": {"patient": 1}, "evaluate": {}}, "did you mean 'train.early_stopping.patience'"),
    ],
)
def test_what_cannot_work_is_refused(changes: dict[str, Any], said: str) -> None:
    """Early stopping needs evaluations during the training, and one metric."""
    with pytest.raises(UserError, match=said):
        parse_config(run_tree(Path("x"), Path("y"), **{"train__early_stopping": {}, **changes}), "test")


def test_a_metric_of_no_evaluation_is_refused_before_the_first_step(shards: Path, tmp_path: Path) -> None:
    """With the evaluations there are."""
    with pytest.raises(UserError, match=r"early_stopping.metric='a/b/c' names no evaluation .*: held_out/scripted"):
        train(config(shards, tmp_path / "run", {"metric": "a/b/c"}))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_end_together(shards: Path, tmp_path: Path) -> None:
    """Started with two processes, the run ends at the second evaluation, since no accuracy can rise by 1, and its model
    has the weights of the better of the two."""
    run, path = tmp_path / "run", tmp_path / "c.yaml"
    evaluate = {"suites": {"colors": {"data": str(shards / "*.tar")}}, "every": 2}
    stopping = {"patience": 1, "min_delta": 1.0}
    tree = run_tree(shards, run, evaluate=evaluate, train__early_stopping=stopping, train__keep=9)
    path.write_text(yaml.safe_dump(tree))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "mmssl.train"]
    subprocess.run([*launch, str(path)], cwd=ROOT, check=True, capture_output=True, timeout=300)
    found = read(run / "best.json")
    assert (found["last"]["step"], found["ended_early"]) == (4, True)
    assert lines(run / "metrics.jsonl")[-1]["step"] == 4
    best = f"step-{found['best']['step']:09d}"
    weights = load_file(run / "checkpoints" / best / "model.safetensors")
    model = mmssl.load(run).encoder.state_dict()
    assert all((tensor == weights[f"ema.{name}"]).all() for name, tensor in model.items())
