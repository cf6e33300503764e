"""The global contrastive objective: what it keeps of each sample, and how it goes through a run."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel

from mmssl.build import resolve
from mmssl.cli.show import describe
from mmssl.config import parse_config
from mmssl.distributed import World
from mmssl.errors import UserError
from mmssl.losses import UNSEEN, global_contrastive
from mmssl.objectives import TrainingTask
from mmssl.train.diagnostics import objective_gradients
from mmssl.train.setup import set_up
from mmssl.train.step import Step, backward
from mmssl.train.trainer import train
from tests.helpers.objective_batch import ROWS, Plain, batch, part, tiny_task
from tests.helpers.ranks import on_ranks
from tests.helpers.tiny_runs import run_tree, write_pairs

TABLE = "objectives.sogclr.estimates"


def steps(world: World, ring: bool = False, micro_batch: int | None = None) -> tuple[dict[str, Any], np.ndarray]:
    """Three steps on this process's rows, in which samples come again: the last gradients, and all estimates."""
    task = tiny_task(["sogclr"], world=world, options={"gamma": 0.6})
    task.on_data(lambda: ROWS + 5)
    task.world = World(world.rank, world.size, equal_batches=True, ring=ring)
    model = task if world.size == 1 else DistributedDataParallel(task, find_unused_parameters=True)
    for i in range(3):
        task.zero_grad()
        given = batch(task, i)
        given.ids = (given.ids + 2 * i) % (ROWS + 5)
        backward(model, Step(task, part(given, world), {"sogclr": 1.0}, 0.5, (0, "step", i), micro_batch), Plain())
    return (
        {name: p.grad.numpy().copy() for name, p in task.named_parameters() if p.grad is not None},
        task.state_dict()[TABLE].numpy(),
    )


def _on_a_rank(world: World) -> list[tuple[dict[str, Any], np.ndarray]]:
    return [steps(world, ring, 4) for ring in (False, True)]


def assert_same(found: tuple[dict[str, Any], np.ndarray], expected: tuple[dict[str, Any], np.ndarray]) -> None:
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-4, atol=1e-5)
    assert found[0].keys() == expected[0].keys()
    for name, gradient in expected[0].items():
        assert np.abs(found[0][name] - gradient).max() <= 2e-5 * max(np.abs(gradient).max(), 1e-4), name


def test_micro_batches_and_processes_keep_the_same_estimates() -> None:
    """After three steps, micro-batches of 5, and two processes with micro-batches of 4 that gather or send round a
    ring, have the gradients and the estimates of one process with whole batches. Samples of no batch have none."""
    expected = steps(World())
    assert_same(steps(World(), micro_batch=5), expected)
    for found in on_ranks(2, _on_a_rank):
        for kind in found:
            assert_same(kind, expected)
    seen = {(row + 2 * i) % (ROWS + 5) for i in range(3) for row in range(ROWS)}
    unseen = [row for row in range(ROWS + 5) if row not in seen]
    assert len(unseen) > 0
    assert (expected[1][unseen] == UNSEEN).all()
    assert np.isfinite(np.delete(expected[1], unseen, 0)).all()


def task_and_step() -> tuple[TrainingTask, Step]:
    task = tiny_task(["sogclr"])
    return task, Step(task, batch(task), {"sogclr": 1.0}, 0.5, (0, "step"))


def test_the_loss_is_that_of_the_estimates() -> None:
    """The second step on a batch reads what is kept, and its loss is that of the pure function; averages may fall too,
    which those of the first step, raised here, do."""
    task, step = task_and_step()
    encoder, given = task.encoder, step.batch
    backward(task, step, Plain())
    kept = task.state_dict()[TABLE].add_(3).clone()
    image, text = encoder.encode_image(given.views["main"]), encoder.encode_text(given.tokens, given.token_mask)
    loss, newest = global_contrastive(image, text, encoder.logit_scale, kept[given.ids], gamma=0.9)
    total, count = backward(task, step, Plain()).sums["sogclr.loss"]
    assert float(total / count) == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(task.state_dict()[TABLE][given.ids], newest)
    assert (newest < kept[given.ids]).all()


def test_measuring_gradients_keeps_nothing() -> None:
    """The gradients that are measured on a part of the batch leave the estimates of the whole batch."""
    task, step = task_and_step()
    other, same = task_and_step()
    backward(other, same, Plain())

    def measure(inputs: Any) -> None:
        few = {name: tensor[:5] for name, tensor in inputs.items()}
        assert objective_gradients(task, few, ["sogclr"], Plain())["sogclr.gradient_norm"] > 0

    backward(task, step, Plain(), measure)
    assert torch.equal(task.state_dict()[TABLE], other.state_dict()[TABLE])


def test_gamma_falls_as_a_cosine() -> None:
    """From gamma at the beginning over the mean in the middle to gamma_end (FastCLIP, section 4)."""
    objective: Any = tiny_task(["sogclr"], options={"gamma": 1.0, "gamma_end": 0.2}).objective("sogclr")
    values = []
    for progress in (0.0, 0.25, 0.5, 1.0):
        objective.on_step_start(progress)
        values.append(objective.gamma)
    assert values == pytest.approx([1.0, 0.5 * (1 + 0.5**0.5) * 0.8 + 0.2, 0.6, 0.2])


def run(folder: Path, name: str, n: int, **changes: Any) -> Path:
    """A run of `n` steps, which is resumed if it exists."""
    objectives = {"sogclr": {"gamma": 0.7}, "mlm": {"weight": 0.1}}
    options = {"evaluate": {}, "objectives": objectives, "train__steps": n, **changes}
    train(parse_config(run_tree(folder, folder / name, **options), "here"), resume=(folder / name).exists())
    return folder / name / "checkpoints" / f"step-{n:09d}"


def test_a_resumed_run_is_bit_identical(tmp_path: Path) -> None:
    """A run that stopped in its second epoch and was resumed ends with the weights and the estimates of an
    uninterrupted one: 48 samples, all of them seen."""
    shards = write_pairs(tmp_path)
    schedule = {"optim__schedule": "constant", "optim__warmup": 0}
    whole = load_file(run(shards, "whole", 14, **schedule) / "model.safetensors")
    run(shards, "parts", 9, **schedule)
    parts = load_file(run(shards, "parts", 14, **schedule) / "model.safetensors")
    assert whole[TABLE].shape == (48, 2)
    assert whole[TABLE].isfinite().all()
    assert whole.keys() == parts.keys()
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())


def test_costs_are_measured_without_data() -> None:
    """`mmssl show` needs no data, so it counts a step without estimates: as much as one of contrastive."""
    tree = run_tree(Path("data"), Path("run"), evaluate={}, objectives={"sogclr": {"gamma_end": 0.2}})
    assert "predicted cost per step: 1.00 x contrastive alone" in describe(parse_config(tree, "here"))


def test_shards_without_numbers_are_refused(tmp_path: Path) -> None:
    """Shards that are read without an index do not number their samples; the message says what to run."""
    shards = write_pairs(tmp_path)
    tree = run_tree(shards, tmp_path / "run", evaluate={}, objectives={"sogclr": {}})
    tree["data"] |= {"train": f"pipe:cat {shards}/0.tar", "allow_pipe": True, "lanes": 1, "workers": 0}
    with pytest.raises(UserError, match=r"objectives\.sogclr keeps values of every sample.*mmssl shards index"):
        set_up(resolve(parse_config(tree, "here")), resume=False, rewind=False)
