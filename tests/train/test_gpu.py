"""What only a GPU can show. All of it runs by: bash scripts/test.sh -m gpu"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmssl.config import OptimConfig, ViewConfig
from mmssl.data.transforms.augment import augment
from mmssl.data.transforms.augment_params import draw_params, from_rows, to_rows
from mmssl.train.optim import build_optimizer, update
from mmssl.train.step import Step, backward
from mmssl.train.step_metrics import AsyncCopy
from scripts.bench.loss import bench_loss
from tests.helpers.objective_batch import Plain, batch, tiny_task

ROOT = Path(__file__).parents[2]
STEPS = 12

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def losses(run: Path, *changes: str, launcher: tuple[str, ...] = ("-m", "mmssl.train"), **environ: str) -> list[float]:
    """The losses of a short run of the smallest configuration, started as users do."""
    fixed = [f"run_dir={run}", f"train.steps={STEPS}", "train.trackers=[]", "train.checkpoint_minutes=null"]
    subprocess.run(
        [sys.executable, *launcher, "configs/ci_tiny.yaml", *fixed, *changes],
        env={**os.environ, **environ},
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of the plain run on the GPU."""
    return losses(tmp_path_factory.mktemp("gpu") / "plain")


def test_the_gpu_follows_the_cpu(plain: list[float], tmp_path: Path) -> None:
    """Without dropout, losses differ by rounding."""
    assert plain == pytest.approx(losses(tmp_path / "run", CUDA_VISIBLE_DEVICES=""), rel=1e-3)


def test_micro_batches_change_rounding_only(plain: list[float], tmp_path: Path) -> None:
    """By number, and as many as fit (all of so few)."""
    assert losses(tmp_path / "few", "train.micro_batch=24") == pytest.approx(plain, rel=1e-3)
    assert losses(tmp_path / "auto", "train.micro_batch=auto") == pytest.approx(plain, rel=1e-3)


def test_fsdp2_through_accelerate_changes_rounding_only(plain: list[float], tmp_path: Path) -> None:
    """One process whose weights are sharded over itself, with EMA, a checkpoint and the final model."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1", "-m", "mmssl.train")
    found = losses(
        tmp_path / "run",
        "train.ema=0.9",
        "train.checkpoint_steps=5",
        launcher=launcher,
        ACCELERATE_USE_FSDP="true",
        FSDP_VERSION="2",
    )
    assert found == pytest.approx(plain, rel=1e-3)
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_compiled_towers_change_rounding_only(plain: list[float], tmp_path: Path) -> None:
    """With torch.compile."""
    assert losses(tmp_path / "run", "train.compile=true") == pytest.approx(plain, rel=1e-3)


def test_half_precisions_learn(plain: list[float], tmp_path: Path) -> None:
    """bf16 and fp16 (with its gradient scaler) stay near float32."""
    for precision in ("bf16", "fp16"):
        assert losses(tmp_path / precision, f"train.precision={precision}") == pytest.approx(plain, rel=0.05)


def test_images_change_alike_on_the_gpu() -> None:
    """With every change drawn for about half of the images: equal to the CPU's to 1/255."""
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (32, 3, 64, 64), dtype=np.uint8))
    names = ("flip", "affine", "color_jitter", "gray", "invert", "solarize", "posterize", "outline", "blur", "erase")
    config = ViewConfig(**dict.fromkeys(names, 0.5))
    draws = from_rows(to_rows([draw_params(rng) for _ in images]))
    expected, found = (augment(images.to(place), config, draws).cpu().int() for place in ("cpu", "cuda"))
    assert (found - expected).abs().max() <= 1
    assert (found != expected).float().mean() < 0.01


def test_numbers_arrive_before_what_was_launched_after_them() -> None:
    """A step's numbers are read while the device is at work on the next one."""
    number = AsyncCopy(torch.ones(1, device="cuda"))
    torch.cuda._sleep(2_000_000_000)  # clock cycles: about a second
    end = torch.cuda.Event()
    end.record()
    assert float(number.here()) == 1
    assert not end.query()
    end.synchronize()


@pytest.mark.parametrize("names", [["contrastive"], ["contrastive", "mae", "mlm", "simclr"], ["siglip", "moco"]])
def test_a_step_makes_the_host_wait_for_nothing(names: list[str]) -> None:
    """Forward, loss, backward, clipping and update of a step that ran before, with torch refusing what waits. (The
    text tower is open_clip's: those of transformers ask whether a caption is padded.)"""
    accelerator: Any = Plain()
    accelerator.scaler = None
    accelerator.clip_grad_norm_ = torch.nn.utils.clip_grad_norm_
    task = tiny_task(names, text={"model_type": "open_clip", "width": 32, "heads": 2, "layers": 2}).cuda()
    optimizer = build_optimizer(task.named_parameters(), OptimConfig())
    given = batch(task).to(torch.device("cuda"))
    for step in range(2):
        torch.cuda.set_sync_debug_mode("error" if step == 1 else "default")
        try:
            backward(task, Step(task, given, dict.fromkeys(names, 1.0), 0.5, (0, "step", step), 5), accelerator)
            update(accelerator, task, optimizer, optimizer, 1.0)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_the_blocked_loss_is_open_clips() -> None:
    """At N = 8,192: equal loss and gradient, in a fraction of the memory."""
    (comparison,) = bench_loss([8192], form="blocked", rounds=1, device="cuda")
    ours, theirs = comparison.ours[0], comparison.theirs[0]
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-4)
    assert ours.gradient_norm == pytest.approx(theirs.gradient_norm, rel=1e-3)
    assert ours.extra_bytes < theirs.extra_bytes
