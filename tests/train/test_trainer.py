"""Runs as users start them: what they leave behind, what they refuse, and that they go on where they stopped."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import mmssl
from mmssl.build import resolve
from mmssl.config import Config, load_config, parse_config
from mmssl.errors import UserError
from mmssl.train.recovery import StopRequest
from mmssl.train.setup import set_up
from mmssl.train.trainer import Trainer, _exhaustion_as_user_error, train
from tests.helpers.tiny_runs import run_tree, write_pairs

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 small images in two tars."""
    return write_pairs(tmp_path_factory.mktemp("shards"))


def config(shards: Path, run: Path, **changes: Any) -> Config:
    return parse_config(run_tree(shards, run, **changes), "test")


def trainer(config: Config, **seams: Any) -> Trainer:
    """A trainer of a new run, with other parts than `train` gives it."""
    return Trainer(set_up(resolve(config), resume=False, rewind=False), **seams)


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def untimed(run: Path) -> list[dict[str, Any]]:
    clocks = ("samples_per_s", "data_wait", "mb_per_s", "seconds", "time_share")
    return [{k: v for k, v in record.items() if not k.endswith(clocks)} for record in metrics(run)]


@pytest.fixture(scope="module")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One uninterrupted run."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    train(config(shards, run))
    return run


def test_a_run_leaves_what_it_promises(finished: Path) -> None:
    """Configuration, one line of metrics per step, the last checkpoints, metrics of the final evaluation, the model."""
    records = metrics(finished)
    assert [r["step"] for r in records] == list(range(1, 9))
    assert all({"loss", "lr", "samples_per_s", "data_wait", "contrastive.accuracy"} <= r.keys() for r in records)
    assert [p.name for p in sorted((finished / "checkpoints").iterdir())] == [
        "step-000000006",
        "step-000000008",
    ]
    results = json.loads((finished / "results.json").read_text())
    assert results["colors/zero_shot"]["classes"] == 4
    assert results["colors/zero_shot"]["samples"] == 48
    assert yaml.safe_load((finished / "config.yaml").read_text())["train"]["steps"] == 8
    assert {p.name for p in (finished / "model").iterdir()} == {
        "model.safetensors",
        "config.json",
        "tokenizer",
    }


def test_the_model_is_imported_with_the_same_features(finished: Path, shards: Path, tmp_path: Path) -> None:
    """mmssl.load gives the EMA weights of the last checkpoint; every way to give an image gives the same vector."""
    model = mmssl.load(finished)
    checkpoint = load_file(finished / "checkpoints" / "step-000000008" / "model.safetensors")
    for name, tensor in model.encoder.state_dict().items():
        assert torch.equal(tensor, checkpoint[f"ema.{name}"]), name
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "x.png")
    ways = [
        tmp_path / "x.png",
        str(tmp_path / "x.png"),
        image,
        torch.from_numpy(pixels).permute(2, 0, 1),
        pixels,
    ]
    features = model.encode_image([*ways, (tmp_path / "x.png").read_bytes()])
    assert features.shape == (6, 16)
    torch.testing.assert_close(features, features[:1].expand(6, -1))
    torch.testing.assert_close(features.norm(dim=1), torch.ones(6))
    torch.testing.assert_close(model.encode_image(image), features[:1])
    assert model.encode_text("a red square").shape == (1, 16)
    probabilities = model.classify(image, ["red", "blue"])
    assert set(probabilities) == {"red", "blue"}
    assert sum(probabilities.values()) == pytest.approx(1)
    assert list(probabilities.values()) == sorted(probabilities.values(), reverse=True)
    assert isinstance(model.vision, torch.nn.Module)
    assert isinstance(model.text, torch.nn.Module)


def test_a_run_cut_after_any_checkpoint_ends_bit_identical(finished: Path, shards: Path, tmp_path: Path) -> None:
    """Back at step 6, in the middle of an epoch, with metrics and ids written beyond it: weights, optimizer, EMA,
    sample order and metrics end equal to the bit."""
    run = tmp_path / "cut"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "checkpoints" / "step-000000008")
    shutil.rmtree(run / "model")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    train(config(shards, run), resume=True)
    for name in ("model", "optimizer"):
        path = Path("checkpoints/step-000000008") / f"{name}.safetensors"
        assert (run / path).read_bytes() == (finished / path).read_bytes()
    assert untimed(run) == untimed(finished)
    assert (run / "sample_ids.jsonl").read_text() == (finished / "sample_ids.jsonl").read_text()
    assert (run / "model" / "model.safetensors").read_bytes() == (finished / "model" / "model.safetensors").read_bytes()


def test_where_images_are_changed_makes_no_difference(shards: Path, tmp_path: Path) -> None:
    """Changed by the workers or in batches beside the model, here both on the CPU, images are the same to 1/255:
    losses of the first steps agree."""
    view = {"flip": 0.5, "color_jitter": 0.8, "gray": 0.2, "blur": 0.5, "crop_scale": [0.3, 1.0]}
    losses = []
    for place in ("host", "device"):
        tree = run_tree(shards, tmp_path / place, train__steps=3, data__views={"main": view}, data__augment_on=place)
        train(parse_config({**tree, "evaluate": {}}, "test"))
        losses.append([record["loss"] for record in untimed(tmp_path / place)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_resuming_a_finished_run_changes_nothing(finished: Path, shards: Path, tmp_path: Path) -> None:
    """The model is written again, the weights are the same."""
    run = tmp_path / "again"
    shutil.copytree(finished, run)
    train(config(shards, run), resume=True)
    assert untimed(run) == untimed(finished)
    assert (run / "model" / "model.safetensors").read_bytes() == (finished / "model" / "model.safetensors").read_bytes()
    evaluations = (run / "evaluations.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in evaluations] == [8]


def test_a_save_that_is_due_by_the_clock_happens_once(shards: Path, tmp_path: Path) -> None:
    """A clock that advances one second per call, three calls per step, and a save every twelve seconds: requested at
    step 5, agreed on at step 6, and not again until the end."""
    clock = partial(next, itertools.count())
    changes = {"train__checkpoint_steps": None, "train__checkpoint_minutes": 0.2, "train__keep": 9, "train__steps": 9}
    trainer(config(shards, tmp_path / "run", evaluate={}, **changes), clock=clock).run()
    saved = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert saved == ["step-000000006", "step-000000009"]


class StopWithoutSignal(StopRequest):
    """The request of a process that got no signal itself."""

    requested = True


def test_a_stop_requested_by_another_process_counts_here(shards: Path, tmp_path: Path) -> None:
    """A process that got no signal itself does not report a finished run."""
    settings = config(shards, tmp_path / "run", evaluate={})
    ended = trainer(settings, stop_request=StopWithoutSignal()).run()
    assert (ended.signal, ended.results) == (signal.SIGTERM, {})
    assert not (tmp_path / "run" / "model").exists()


def test_a_device_out_of_memory_says_what_to_do(tmp_path: Path) -> None:
    """One line with the switch that helps."""
    said = r"out of memory \(Tried to allocate 2 GiB\).*train.micro_batch=auto"
    with (
        pytest.raises(UserError, match=said),
        _exhaustion_as_user_error(tmp_path, "go on with: mmssl train --resume RUN"),
    ):
        raise torch.OutOfMemoryError("Tried to allocate 2 GiB\nmore")


@pytest.mark.parametrize(("before", "found", "expected"), [(None, 4, 4), (2, 4, 2), (8, 4, 4)])
def test_a_resumed_run_keeps_its_micro_batch_if_it_fits(
    before: int | None, found: int, expected: int, finished: Path, shards: Path, tmp_path: Path
) -> None:
    """`auto` keeps what the checkpoint has, where that is not more than fits now."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    path = run / "checkpoints" / "step-000000008" / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "micro_batch": before}))
    plan = resolve(config(shards, run, train__micro_batch="auto"))
    built = set_up(plan, resume=True, rewind=False, fit=lambda *_: (found, "as the test says"))
    assert built.trained.run.micro_batch == expected


def test_the_same_seed_gives_the_same_run_and_another_does_not(finished: Path, shards: Path, tmp_path: Path) -> None:
    """Equal metrics for equal seeds; other losses and another order for another seed."""
    train(config(shards, tmp_path / "same"))
    assert untimed(tmp_path / "same") == untimed(finished)
    train(config(shards, tmp_path / "other", seed=1))
    assert untimed(tmp_path / "other")[0]["loss"] != untimed(finished)[0]["loss"]
    assert (tmp_path / "other" / "sample_ids.jsonl").read_text() != (finished / "sample_ids.jsonl").read_text()


def test_a_loss_that_is_not_finite_skips_the_update_and_stops_after_a_few(shards: Path, tmp_path: Path) -> None:
    """With an absurd learning rate the run stops with the samples named; the weights it saved are finite."""
    run = tmp_path / "nan"
    settings = config(shards, run, optim__lr=1e20, optim__warmup=0, train__nonfinite_limit=2, train__steps=30)
    with pytest.raises(UserError, match="not finite"):
        train(settings)
    named = json.loads(next(run.glob("nonfinite-*.json")).read_text())
    assert [len(step["keys"]) for step in named["steps"]] == [8, 8]
    assert metrics(run)[-1]["skipped_updates"] >= 1


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def test_sigterm_saves_and_stops_and_the_run_goes_on(shards: Path, finished: Path, tmp_path: Path) -> None:
    """The exit code is 128 + 15, no model is left half-made, and the resumed run ends with the same weights."""
    run, path = tmp_path / "stopped", tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(run_tree(shards, run, train__steps=400)))
    process = subprocess.Popen(
        [sys.executable, "-m", "mmssl", "train", str(path)],
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    while not (run / "metrics.jsonl").is_file() or len((run / "metrics.jsonl").read_text().splitlines()) < 2:
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + 15, errors
    assert "--resume" in errors
    assert not (run / "model").exists()
    step = metrics(run)[-1]["step"]
    assert (run / "checkpoints" / f"step-{step:09d}").is_dir()
    whole = tmp_path / "whole"
    train(config(shards, whole, train__steps=400 if step > 350 else step + 4))
    train(config(shards, run, train__steps=400 if step > 350 else step + 4), resume=True)
    assert [r["step"] for r in metrics(run)] == [r["step"] for r in metrics(whole)]


# The tutorial on scale, which the tests run, compares the losses of the two too.
@pytest.mark.slow
@pytest.mark.parametrize("vision", ["vit", "resnet"])
def test_two_processes_follow_one(vision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`accelerate launch --cpu --num_processes 2` follows one process at the same global batch: 20 losses within 1e-4
    (with batch norm, where rounding grows by itself, the first 6)."""
    steps = 20 if vision == "vit" else 6
    changes = [
        f"train.steps={steps}",
        "train.trackers=[]",
        "train.checkpoint_minutes=null",
        "data.batch_size=32",
        "train.precision=fp32",
    ]
    if vision == "resnet":
        changes += [
            "model.vision.name=timm:resnet10t",
            "model.vision.options={channels: [8, 16, 16, 32], stem_width: 8}",
        ]
    monkeypatch.chdir(ROOT)
    train(load_config(Path("configs/ci_tiny.yaml"), [f"run_dir={tmp_path / '1'}", *changes]))
    launcher = ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "mmssl.train"]
    command = [sys.executable, "-m", *launcher, "configs/ci_tiny.yaml", f"run_dir={tmp_path / '2'}", *changes]
    subprocess.run(command, env=environment(), check=True, capture_output=True)
    one, two = ([r["loss"] for r in metrics(tmp_path / str(count))] for count in (1, 2))
    assert len(one) == steps
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) < 1e-4
    assert one[-1] < one[0]
