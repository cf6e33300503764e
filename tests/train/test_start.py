"""What of a launcher's settings a run takes over, and what not."""

import os
from pathlib import Path

import pytest

from mmssl.config import parse_config
from mmssl.train.start import build_accelerator
from mmssl.types import UserError
from tests.pairs import run_tree


def test_every_process_builds_the_whole_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`accelerate launch --use_fsdp` tells transformers to leave weights out on all processes but one; it is told
    otherwise before any tower is built."""
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    build_accelerator(parse_config(run_tree(tmp_path, tmp_path / "run"), "test"))
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"


def test_accumulation_by_the_launcher_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would divide every gradient."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(UserError, match="train.micro_batch"):
        build_accelerator(parse_config(run_tree(tmp_path, tmp_path / "run"), "test"))
    monkeypatch.delenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
    build_accelerator(parse_config(run_tree(tmp_path, tmp_path / "run"), "test"))
