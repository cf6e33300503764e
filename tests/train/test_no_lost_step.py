"""Whatever ends a run, it goes on as if nothing had happened, and says what it found."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)

from mmssl.build import resolve
from mmssl.config import Config, parse_config
from mmssl.errors import UserError
from mmssl.train.recovery import BadStep, rewind, write_bad_steps
from mmssl.train.setup import set_up
from mmssl.train.step import Step, Tally, backward
from mmssl.train.trainer import Trainer, train
from tests.helpers.tiny_runs import run_tree, write_pairs

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 small images in two tars."""
    return write_pairs(tmp_path_factory.mktemp("shards"))


def config(shards: Path, run: Path, **changes: Any) -> Config:
    return parse_config(run_tree(shards, run, **{"train__keep": 9, **changes}), "test")


@pytest.fixture(scope="module")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One uninterrupted run with checkpoints of steps 3, 6 and 8."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    train(config(shards, run))
    return run


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def cut_back(finished: Path, run: Path, step: int) -> Path:
    """A copy of a run whose checkpoints after `step` are gone."""
    shutil.copytree(finished, run)
    for path in (run / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    return run


def assert_same_end(run: Path, finished: Path) -> None:
    """Weights, optimizer, EMA, order of samples and losses are equal to the bit."""
    for name in ("model", "optimizer"):
        path = Path("checkpoints/step-000000008") / f"{name}.safetensors"
        assert (run / path).read_bytes() == (finished / path).read_bytes()
    assert (run / "sample_ids.jsonl").read_text() == (finished / "sample_ids.jsonl").read_text()
    losses = [[(r["step"], r["loss"]) for r in lines(folder / "metrics.jsonl")] for folder in (run, finished)]
    assert losses[0] == losses[1]


def test_a_cut_newest_checkpoint_and_deleted_indexes_change_nothing(
    shards: Path, finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The run says which checkpoint it passed over, goes on from the one before and ends bit-identical."""
    own = tmp_path / "shards"
    shutil.copytree(shards, own)
    run = cut_back(finished, tmp_path / "run", 6)
    newest = run / "checkpoints" / "step-000000006" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    indexes = [path for path in own.iterdir() if path.suffix in (".idx", ".json")]
    assert indexes
    for path in indexes:
        path.unlink()
    train(config(own, run), resume=True)
    said = capfd.readouterr().err
    assert "passed over" in said
    assert "step-000000006" in said
    assert "step-000000003 at step 3" in said
    assert_same_end(run, finished)


def test_other_library_versions_are_named(
    shards: Path, finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint of another torch says so when it is resumed, and when it does not fit."""
    run = cut_back(finished, tmp_path / "run", 6)
    path = run / "checkpoints" / "step-000000006" / "state.json"
    state = json.loads(path.read_text())
    state["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"written with torch 1.0, now .* another architecture"):
        train(config(shards, run, model__embed_dim=8), resume=True)
    train(config(shards, run), resume=True)
    assert "written with torch 1.0, now" in capfd.readouterr().err


def command(run: Path) -> list[str]:
    return [sys.executable, "-m", "mmssl", "train", "--resume", str(run)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def test_a_full_disk_is_an_error_and_the_run_goes_on(shards: Path, finished: Path, tmp_path: Path) -> None:
    """A checkpoint that finds no room leaves the ones before it whole and nothing half-made; with room again, the run
    ends bit-identical. (The room is bounded by the largest file that the process may write.)"""
    run = cut_back(finished, tmp_path / "run", 3)
    room = (run / "checkpoints" / "step-000000003" / "optimizer.safetensors").stat().st_size - 1

    def bounded() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    tree = run_tree(shards, run, train__keep=9)
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    done = subprocess.run(
        command(run), env=environment(), cwd=ROOT, capture_output=True, text=True, preexec_fn=bounded, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "could not write checkpoint" in done.stderr
    assert "--resume" in done.stderr
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000000003"]
    train(config(shards, run), resume=True)
    assert_same_end(run, finished)


def poisoned(bad_ids: set[int]) -> Any:
    """The step's `backward`, whose gradient is not a number for batches with one of these samples."""

    def replaced(model: Any, step: Step, *arguments: Any) -> Tally:
        tally = backward(model, step, *arguments)
        if bad_ids & set(step.batch.ids.tolist()):
            weight = next(p for p in step.task.parameters() if p.grad is not None)
            assert weight.grad is not None
            weight.grad.fill_(torch.nan)
        return tally

    return replaced


def test_rewind_goes_on_past_the_bad_data(
    shards: Path, finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A run that stops at steps 4 and 5 names their samples. Rewound, it goes on from step 3 with the data of step 6,
    also when it is resumed once more. Without a stop at bad data, rewinding is an error."""
    ids = [record["ids"] for record in lines(finished / "sample_ids.jsonl")]
    run = tmp_path / "run"
    bad = poisoned({ids[3][0], ids[4][0]})

    def train_badly(resume: bool = False, rewind: bool = False, **changes: Any) -> None:
        Trainer(set_up(resolve(config(shards, run, **changes)), resume, rewind), backward=bad).run()

    with pytest.raises(UserError, match="--rewind"):
        train_badly(train__nonfinite_limit=2)
    named = json.loads((run / "nonfinite-step-5-rank-0.json").read_text())["steps"]
    assert [(bad["step"], len(bad["keys"])) for bad in named] == [(4, 8), (5, 8)]
    with pytest.raises(UserError, match="not finite"):
        train_badly(resume=True, train__nonfinite_limit=2)
    train_badly(resume=True, rewind=True, train__nonfinite_limit=2, train__steps=5)
    assert "batches of steps 4 to 5 are skipped" in capfd.readouterr().err
    assert [record["ids"] for record in lines(run / "sample_ids.jsonl")] == [*ids[:3], *ids[5:7]]
    shutil.rmtree(run / "checkpoints" / "step-000000005")
    train_badly(resume=True, train__steps=6)
    assert [record["ids"] for record in lines(run / "sample_ids.jsonl")] == [*ids[:3], *ids[5:8]]
    with pytest.raises(UserError, match="did not stop at bad data"):
        train_badly(resume=True, rewind=True)


def test_a_run_that_went_on_is_not_rewound(tmp_path: Path) -> None:
    """A note of bad data before the newest checkpoint is of the past: nothing is deleted."""
    write_bad_steps(tmp_path, 0, [BadStep(4, ["a"]), BadStep(5, ["b"])])
    for step in (3, 9):
        (tmp_path / "checkpoints" / f"step-{step:09d}").mkdir(parents=True)
    with pytest.raises(UserError, match="continued past the bad data of steps 4 to 5"):
        rewind(tmp_path)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_trackers_show_every_step_once(shards: Path, tmp_path: Path) -> None:
    """Steps done again after a cut replace those before it in TensorBoard."""
    run = tmp_path / "run"
    train(config(shards, run, train__trackers=["tensorboard"]))
    shutil.rmtree(run / "checkpoints" / "step-000000008")
    train(config(shards, run, train__trackers=["tensorboard"]), resume=True)
    folder = next(path.parent for path in run.rglob("events.out.tfevents*"))
    events = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 9))


def processes_of(launcher: psutil.Process) -> dict[str, psutil.Process]:
    """The training processes under a launcher, by rank."""
    found = {}
    for child in launcher.children(recursive=True):
        try:
            environ = child.environ()
        except psutil.Error:
            continue
        if "RANK" in environ:
            found[environ["RANK"]] = child
    return found


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["0", "1"])
def test_when_one_process_dies_the_other_says_so_and_the_run_goes_on(killed: str, shards: Path, tmp_path: Path) -> None:
    """Of two processes, one is killed: the launcher ends with an error, the other process with one line that names the
    remedy, and the run resumes with both."""
    run, path = tmp_path / "run", tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(run_tree(shards, run, train__steps=100_000, train__checkpoint_steps=3)))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "mmssl.train"]
    process = subprocess.Popen(
        [*launch, str(path)], env=environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd=ROOT
    )
    while not list((run / "checkpoints").glob("step-*")):
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.1)
    processes_of(psutil.Process(process.pid))[killed].send_signal(signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert f"error{'' if killed == '1' else ' (process 1)'}: another process of this run is gone" in errors, errors
    assert f"mmssl train --resume {run}" in errors
    step = max(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))
    again = [*launch, "--resume", str(run), f"train.steps={step + 5}"]
    subprocess.run(again, env=environment(), cwd=ROOT, check=True, capture_output=True)
    assert [record["step"] for record in lines(run / "metrics.jsonl")] == list(range(1, step + 6))
    # Judged by both processes, each sample counted once.
    assert json.loads((run / "results.json").read_text())["colors/zero_shot"]["samples"] == 48
