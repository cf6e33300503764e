"""The quickstart holds on CPUs with and without fast bf16."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
AVX2_ALONE = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}


def first_steps(run: Path, environment: dict[str, str]) -> tuple[str, list[float]]:
    """The precision that the quickstart's first 20 steps (of 64 pairs) chose, and their losses."""
    settings = ["train.steps=20", "data.batch_size=64", f"run_dir={run}", "evaluate.suites={}"]
    command = [sys.executable, "-m", "mmssl", "train", "configs/quickstart.yaml", *settings]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["train"]["precision"], losses


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="other CPUs have no AVX2")
def test_the_quickstart_begins_alike_with_avx2_alone(tmp_path: Path) -> None:
    """Held to AVX2, the quickstart chooses fp32 by itself; its first 20 losses are those of this CPU's own choice to
    2 %, as bf16 keeps 8 bits."""
    precision, losses = first_steps(tmp_path / "avx2", AVX2_ALONE)
    _, own = first_steps(tmp_path / "own", {})
    assert precision == "fp32"
    assert losses == pytest.approx(own, rel=0.02)
    assert losses[-1] < losses[0]
