"""Checks before a run starts, and the launcher settings a run accepts."""

import os
from pathlib import Path
from typing import Any

import pytest

from mmssl.build import resolve
from mmssl.config import parse_config
from mmssl.errors import UserError
from mmssl.train.setup import build_accelerator
from tests.helpers.tiny_runs import run_tree, write_pairs


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 small images in two tars."""
    return write_pairs(tmp_path_factory.mktemp("shards"))


def test_every_process_builds_the_whole_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`accelerate launch --use_fsdp` tells transformers to leave weights out on all processes but one; the run
    overrides it before any tower is built."""
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


@pytest.mark.parametrize(
    ("objectives", "gap"),
    [
        ({"contrastive": {}}, None),
        ({"contrastive": {}, "mlm": {"start": 0.2, "ramp": 0.1, "every": 3}}, None),
        ({"mlm": {"end": 0.5}, "contrastive": {"start": 0.5}}, None),
        ({"mlm": {"end": 0.5}, "contrastive": {"start": 0.5, "ramp": 0.2}}, None),
        ({"mlm": {"end": 0.4}, "contrastive": {"start": 0.5}}, "45%"),
        ({"contrastive": {"ramp": 0.1}}, "0%"),
        ({"contrastive": {"every": 2}}, "0%"),
        ({"contrastive": {"end": 0.9}, "mlm": {"weight": 0}}, "95%"),
    ],
)
def test_steps_without_an_objective_are_refused(
    objectives: dict[str, Any], gap: str | None, shards: Path, tmp_path: Path
) -> None:
    """The plan of a run is refused if an objective is missing at some step; schedules may follow on each other."""
    config = parse_config(run_tree(shards, tmp_path / "run", objectives=objectives), "test")
    if gap is None:
        assert set(resolve(config).objectives) == set(objectives)
        return
    with pytest.raises(UserError, match=f"after {gap} of the training there are steps at which none acts"):
        resolve(config)
