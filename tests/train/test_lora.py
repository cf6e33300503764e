"""Runs with adapters: resumed, on two processes, from a model that exists, and what they leave behind."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel

import mmssl
from mmssl.cli.show import describe
from mmssl.config import Config, LoraConfig, parse_config
from mmssl.distributed import World
from mmssl.errors import UserError
from mmssl.models.lora import add_adapters
from mmssl.objectives._mixing import TrainingTask
from mmssl.train.step import Step, backward
from mmssl.train.trainer import train
from tests.helpers.models import tiny_model_config
from tests.helpers.objective_batch import Plain
from tests.helpers.ranks import on_ranks
from tests.helpers.tiny_runs import run_tree, write_pairs
from tests.models.test_lora import draw_adapters
from tests.train.test_step import ROWS, assert_same, batch, gradients, task

LORA = {"rank": 2, "dropout": 0.1}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 small images in two tars."""
    return write_pairs(tmp_path_factory.mktemp("shards"))


def config(shards: Path, run: Path, **changes: Any) -> Config:
    tree = run_tree(shards, run, **changes)
    for tower in ("vision", "text"):
        tree["model"][tower] = {**tree["model"][tower], "lora": LORA}
    return parse_config(tree, "test")


@pytest.fixture(scope="module")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One uninterrupted run with adapters in both towers, dropout and a moving average."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    train(config(shards, run, evaluate={}))
    return run


def test_a_run_cut_in_the_middle_ends_bit_identical(finished: Path, shards: Path, tmp_path: Path) -> None:
    """From step 6 of 8 on: adapters, optimizer, moving average and the merged model are equal to the bit."""
    run = tmp_path / "cut"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "checkpoints" / "step-000000008")
    shutil.rmtree(run / "model")
    train(config(shards, run, evaluate={}), resume=True)
    for path in ("checkpoints/step-000000008/model.safetensors", "checkpoints/step-000000008/optimizer.safetensors"):
        assert (run / path).read_bytes() == (finished / path).read_bytes()
    assert (run / "model" / "model.safetensors").read_bytes() == (finished / "model" / "model.safetensors").read_bytes()


def test_the_model_is_written_without_adapters(finished: Path) -> None:
    """The folder holds plain towers whose weights are the averaged ones with B A added; frozen weights are those of
    the start to the bit."""
    model = mmssl.load(finished)
    assert model.config.vision.lora is None
    assert model.config.text.lora is None
    weights = model.encoder.state_dict()
    checkpoint = load_file(finished / "checkpoints" / "step-000000008" / "model.safetensors")
    place = "vision.trunk.blocks.0.attn.qkv"
    base, a, b = (checkpoint[f"ema.{place}.{n}.weight"] for n in ("base_layer", "lora_A.default", "lora_B.default"))
    assert float(b.abs().max()) > 0
    torch.testing.assert_close(weights[f"{place}.weight"], base + 16 / 2 * b @ a)
    first = load_file(finished / "checkpoints" / "step-000000006" / "model.safetensors")
    frozen = [n for n in checkpoint if n.startswith(("encoder.vision.", "encoder.text.")) and "lora_" not in n]
    assert frozen
    assert all(torch.equal(checkpoint[name], first[name]) for name in frozen)
    optimized = load_file(finished / "checkpoints" / "step-000000008" / "optimizer.safetensors")
    names = {name.rpartition("/")[0] for name in optimized}
    assert not any(name in names for name in frozen)


def test_a_run_goes_on_from_a_model_with_adapters(finished: Path, shards: Path, tmp_path: Path) -> None:
    """`model.start` brings the towers, `lora` beside it the adapters; text.name beside it is still refused."""
    tree = run_tree(shards, tmp_path / "more", evaluate={}, train__steps=2)
    tree["model"] = {"start": str(finished), "vision": {"lora": LORA}, "text": {"lock": True}}
    train(parse_config(tree, "test"))
    before, after = mmssl.load(finished).encoder.state_dict(), mmssl.load(tmp_path / "more").encoder.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "vision.trunk.blocks.0.attn.qkv.weight" in changed
    assert not any(name.startswith("text.") for name in changed)
    tree["model"]["vision"]["name"] = "timm:resnet10t"
    with pytest.raises(UserError, match="vision.name cannot be set beside model.start"):
        train(parse_config({**tree, "run_dir": str(tmp_path / "other")}, "test"))


def test_show_counts_what_trains(shards: Path, tmp_path: Path) -> None:
    """Beside the size of each tower and of all stands how much of it trains: rank * (in + out) of each layer."""
    text = describe(config(shards, tmp_path / "run"))
    vision = 2 * ((32 + 96) + (32 + 32) + 2 * (32 + 128))  # qkv, proj, fc1, fc2 of one block
    (line,) = (line for line in text.splitlines() if "vision tower (" in line)
    assert f"{vision:,} of them trained" in line
    assert any("total" in line and "of them trained" in line for line in text.splitlines())


def adapted_mixer() -> TrainingTask:
    module = task(0.0)
    lora = LoraConfig(rank=2)
    towers = tiny_model_config()
    vision, text = (tower.model_copy(update={"lora": lora}) for tower in (towers.vision, towers.text))
    add_adapters(module.encoder, towers.model_copy(update={"vision": vision, "text": text}))
    # Not larger: at 0.3 rounding alone, as of samples in another order, comes to 2e-5 of a gradient.
    draw_adapters(module.encoder, 0.1)
    return module.train()


def on_one_rank(world: World) -> dict[str, np.ndarray]:
    """One process's step under DDP on its half of the batch; the averaged gradient."""
    module = adapted_mixer()
    module.world = replace(world, equal_batches=True)
    rows = ROWS // world.size
    part = batch().slice(world.rank * rows, (world.rank + 1) * rows)
    backward(DistributedDataParallel(module), Step(module, part, {"contrastive": 1.0}, 0.0, (1, "step", 2)), Plain())
    return {name: gradient.numpy() for name, gradient in gradients(module).items()}


def test_two_processes_give_the_whole_batchs_gradient() -> None:
    """Under DDP the adapters' gradients are those of one process on the whole batch, to 1e-5 of the largest entry."""
    module = adapted_mixer()
    backward(module, Step(module, batch(), {"contrastive": 1.0}, 0.0, (1, "step", 2)), Accelerator(cpu=True))
    expected = gradients(module)
    assert any("lora_A" in name for name in expected)
    for found in on_ranks(2, on_one_rank):
        assert_same(found, expected)
