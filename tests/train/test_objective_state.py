"""Objectives with state of their own, in a run that is interrupted."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import mmssl
from mmssl.config import Config, parse_config
from mmssl.errors import UserError
from mmssl.train.checkpoint import load_checkpoint
from mmssl.train.trainer import train
from tests.helpers.objective_batch import OPTIONS, TEACHER
from tests.helpers.tiny_runs import run_tree, write_pairs

NAMES = ("distill", "words", "redundancy", "byol", "maskfeat", "replaced_tokens")


def config(shards: Path, run: Path, teacher: Path) -> Config:
    objectives = {name: {**OPTIONS.get(name, {}), "weight": 0.1} for name in NAMES}
    objectives["distill"]["teacher"] = str(teacher)
    tree = run_tree(shards, run, evaluate={}, objectives={"contrastive": {}, **objectives})
    tree["model"]["vision"]["image_size"] = 24
    tree["train"] |= {"steps": 6, "checkpoint_steps": 3, "keep": 9, "micro_batch": 5}
    return parse_config(tree, "test")


def test_a_resumed_run_ends_with_the_same_state(tmp_path: Path) -> None:
    """From the checkpoint of step 3, all weights, momentum encoders and counts of step 6 are bit-identical, with
    micro-batches; the teacher's weights are in no checkpoint. With another teacher the run is refused."""
    (tmp_path / "shards").mkdir()
    shards, teacher = write_pairs(tmp_path / "shards"), tmp_path / "teacher"
    shutil.copytree(TEACHER, teacher)
    whole, again = tmp_path / "whole", tmp_path / "again"
    train(config(shards, whole, teacher))
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoints" / "step-000000006")
    shutil.rmtree(again / "model")
    train(config(shards, again, teacher), resume=True)
    tensors, found = (load_checkpoint(run / "checkpoints" / "step-000000006")[0] for run in (whole, again))
    assert tensors.keys() == found.keys()
    assert not any(".teacher." in name for name in tensors)
    for name in ("words.captions_with", "replaced_tokens.counts", "byol.slow", "maskfeat.slow", "distill.fingerprint"):
        assert any(key.startswith(f"objectives.{name}") for key in tensors)
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor), name
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert all(f"{name}.loss" in records[-1] for name in NAMES)
    other = mmssl.load(teacher)
    with torch.no_grad():
        other.encoder.text_projection.weight.add_(0.01)
    other.save(teacher)
    with pytest.raises(UserError, match="not the teacher that this run began with"):
        train(config(shards, again, teacher), resume=True)
