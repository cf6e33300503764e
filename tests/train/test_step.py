"""A step's gradient is that of the whole batch, whatever the micro-batch."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel

from mmssl.config import ModelConfig, VisionConfig
from mmssl.distributed import World
from mmssl.models import build_dual_encoder
from mmssl.objectives import find_objective
from mmssl.objectives._base import Vocabulary
from mmssl.objectives._mixing import TrainingTask
from mmssl.rng import RowRandom, torch_generator, torch_seed
from mmssl.train.step import Step, backward
from mmssl.types import Batch
from tests.helpers import objective_batch as problem
from tests.helpers.models import tiny_model_config
from tests.helpers.objective_batch import Plain
from tests.helpers.ranks import on_ranks

ROWS = 12


def task(dropout: float = 0.0, config: ModelConfig | None = None) -> TrainingTask:
    torch.manual_seed(0)
    encoder = build_dual_encoder(config or tiny_model_config(dropout, dropout), 100, 0)
    kind = find_objective("contrastive")
    vocabulary = Vocabulary(100, 4, (0, 1, 2, 3, 4), torch.zeros(100, dtype=torch.bool), 77)
    return TrainingTask(encoder, {"contrastive": kind(kind.Options(), encoder, vocabulary)}, World()).train()


def batch() -> Batch:
    g = torch.Generator().manual_seed(5)
    tokens = torch.randint(5, 100, (ROWS, 6), generator=g)
    mask = torch.arange(6) < torch.randint(3, 7, (ROWS, 1), generator=g)
    views = {"main": torch.randint(0, 256, (ROWS, 3, 16, 16), dtype=torch.uint8, generator=g)}
    return Batch(views, tokens * mask, mask, torch.arange(ROWS), [f"k{i}" for i in range(ROWS)])


def gradients(module: TrainingTask) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def by_hand(module: TrainingTask, starts: Sequence[int]) -> tuple[float, dict[str, torch.Tensor]]:
    """The whole batch with one graph: encodings made from each start on with that part's dropout, then CLIP's loss."""
    data = batch()
    images, texts = [], []
    for a, b in pairwise([*starts, ROWS]):
        part = data.slice(a, b)
        torch.manual_seed(torch_seed(1, "step", 2, "dropout", a))
        images.append(module.encoder.encode_image(part.views["main"]))
        texts.append(module.encoder.encode_text(part.tokens, part.token_mask))
    logits = module.encoder.logit_scale * torch.cat(images) @ torch.cat(texts).T
    target = torch.arange(ROWS)
    loss = (torch.nn.functional.cross_entropy(logits, target) + torch.nn.functional.cross_entropy(logits.T, target)) / 2
    loss.backward()
    return float(loss.detach()), gradients(module)


def assert_same(found: dict[str, np.ndarray], expected: dict[str, torch.Tensor]) -> None:
    """Every gradient within 1e-5 of its largest entry (or of 1e-4, where it is zero but for rounding)."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = max(float(gradient.abs().max()), 1e-4)
        assert np.abs(found[name] - gradient.numpy()).max() < 1e-5 * scale, name


@pytest.mark.parametrize("micro_batch", [None, 1, 5, 12, 64])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_any_micro_batch_gives_the_whole_batchs_gradient(micro_batch: int | None, dropout: float) -> None:
    """With dropout and drop-path on, and a leftover micro-batch, loss and gradients equal one graph over the batch."""
    module = task(dropout)
    expected_loss, expected = by_hand(module, range(0, ROWS, micro_batch or ROWS))
    module.zero_grad()
    tally = backward(
        module, Step(module, batch(), {"contrastive": 1.0}, 0.0, (1, "step", 2), micro_batch), Accelerator(cpu=True)
    )
    total, count = tally.sums["contrastive.loss"]
    assert float(total / count) == pytest.approx(expected_loss, rel=1e-5)
    assert_same({name: gradient.numpy() for name, gradient in gradients(module).items()}, expected)


@pytest.mark.parametrize(("micro_batch", "recompute"), [(None, True), (5, False), (5, True)])
def test_a_forward_pass_that_runs_again_counts_once(micro_batch: int | None, recompute: bool) -> None:
    """With activation checkpointing and with micro-batches, running statistics of batch norms are those of one plain
    forward pass of each micro-batch."""
    config = tiny_model_config().model_copy(update={"vision": VisionConfig(name="timm:resnet10t", image_size=16)})
    module = task(config=config)
    plain = copy.deepcopy(module.encoder.vision)
    for a in range(0, ROWS, micro_batch or ROWS):
        plain(batch().views["main"][a : a + (micro_batch or ROWS)])
    if recompute:
        module.encoder.vision.checkpoint_activations()
    backward(
        module, Step(module, batch(), {"contrastive": 1.0}, 0.0, (1, "step", 2), micro_batch), Accelerator(cpu=True)
    )
    found = dict(module.encoder.vision.named_buffers())
    for name, expected in plain.named_buffers():
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-7, msg=name)
    assert sum("running_mean" in name for name in found) > 10


CASES: dict[int, list[tuple[int | None, bool]]] = {
    1: [(5, True)],
    2: [(None, False), (4, False), (None, True), (4, True)],
    3: [(1, False), (3, False), (3, True)],
    4: [(2, False), (2, True)],
}
"""Processes -> micro-batches, with features gathered or going round a ring."""


def on_one_rank(world: World) -> list[dict[str, np.ndarray]]:
    return [part_of_a_step(world, *case) for case in CASES[world.size]]


def part_of_a_step(world: World, micro_batch: int | None, ring: bool) -> dict[str, np.ndarray]:
    """One process's step under DDP on its part of the batch; the averaged gradient."""
    module = task(0.3)
    module.world = replace(world, equal_batches=True, ring=ring)
    rows = ROWS // world.size
    part = batch().slice(world.rank * rows, (world.rank + 1) * rows)
    model = DistributedDataParallel(module)
    backward(model, Step(module, part, {"contrastive": 1.0}, 0.0, (1, "step", 2), micro_batch), Plain())
    return {name: gradient.numpy() for name, gradient in gradients(module).items()}


@pytest.mark.parametrize("world_size", CASES)
def test_any_number_of_processes_gives_the_whole_batchs_gradient(world_size: int) -> None:
    """With dropout and drop-path on, under DDP, with leftovers, where each process gathers all features and where none
    does: largest difference to one process 1e-5 of the largest entry of each gradient."""
    rows = ROWS // world_size
    ranks = on_ranks(world_size, on_one_rank)
    for case, (micro_batch, _) in enumerate(CASES[world_size]):
        starts = [rank * rows + a for rank in range(world_size) for a in range(0, rows, micro_batch or rows)]
        _, expected = by_hand(task(0.3), starts)
        for found in ranks:
            assert_same(found[case], expected)


MIXES = [("contrastive", "mlm"), ("mae", "contrastive"), ("mlm", "contrastive", "mae")]
WEIGHTS = {"contrastive": 1.0, "mlm": 0.5, "mae": 2.0}


def mix_by_hand(names: Sequence[str], starts: Sequence[int]) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """The whole batch with one graph: features of each part with its dropout, CLIP's loss on all of them, and the other
    objectives' sums over the parts by the number of their terms. Each objective's loss, and the gradients."""
    module = problem.tiny_task(list(names), dropout=0.3)
    inputs = module.inputs(
        problem.batch(module),
        names,
        lambda name: RowRandom(torch_generator(1, "step", 2, "objective", name), 0, ROWS, ROWS),
        0.5,
    )
    parts, losses = [], dict.fromkeys(names, torch.zeros(()))
    for a, b in pairwise([*starts, ROWS]):
        rows = {name: tensor[a:b] for name, tensor in inputs.items()}
        torch.manual_seed(torch_seed(1, "step", 2, "dropout", a))
        parts.append(module.predict(rows, names))
        for name in set(names) - {"contrastive"}:
            objective = module.objective(name)
            total = objective.loss(parts[-1][name], rows, World()).total
            losses[name] = losses[name] + total / objective.num_terms(inputs)
    images, texts = (torch.cat([part["contrastive"][key] for part in parts]) for key in ("image", "text"))
    logits, target = module.encoder.logit_scale * images @ texts.T, torch.arange(ROWS)
    cross_entropy = torch.nn.functional.cross_entropy
    losses["contrastive"] = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
    torch.stack([WEIGHTS[name] * loss for name, loss in losses.items()]).sum().backward()
    return {name: float(loss.detach()) for name, loss in losses.items()}, gradients(module)


@pytest.mark.parametrize("micro_batch", [None, 1, 5, 12])
@pytest.mark.parametrize("names", MIXES, ids="+".join)
def test_a_mix_has_the_whole_batchs_gradient_too(names: tuple[str, ...], micro_batch: int | None) -> None:
    """A loss among all samples together with losses of single ones, dropout and drop-path on, any micro-batch: the
    first pass meets the contrastive forwards alone, the second all; losses and gradients equal one graph's."""
    losses, expected = mix_by_hand(names, range(0, ROWS, micro_batch or ROWS))
    module = problem.tiny_task(list(names), dropout=0.3)
    weights = {name: WEIGHTS[name] for name in names}
    tally = backward(module, Step(module, problem.batch(module), weights, 0.5, (1, "step", 2), micro_batch), Plain())
    for name, loss in losses.items():
        total, count = tally.sums[f"{name}.loss"]
        assert float(total / count) == pytest.approx(loss, rel=1e-5)
    assert_same({name: gradient.numpy() for name, gradient in gradients(module).items()}, expected)


def mix_on_one_rank(world: World, names: tuple[str, ...], micro_batch: int) -> dict[str, np.ndarray]:
    module = problem.tiny_task(list(names), world=world, dropout=0.3)
    weights = {name: WEIGHTS[name] for name in names}
    mine = problem.part(problem.batch(module), world)
    model = DistributedDataParallel(module, find_unused_parameters=True)
    backward(model, Step(module, mine, weights, 0.5, (1, "step", 2), micro_batch), Plain())
    return {name: gradient.numpy() for name, gradient in gradients(module).items()}


def test_a_mix_over_processes_has_the_whole_batchs_gradient() -> None:
    """The same under DDP with two processes and a leftover micro-batch."""
    names, rows = MIXES[-1], ROWS // 2
    _, expected = mix_by_hand(names, [rank * rows + a for rank in range(2) for a in range(0, rows, 4)])
    for found in on_ranks(2, mix_on_one_rank, names, 4):
        assert_same(found, expected)


def test_weight_scales_the_gradient() -> None:
    """Weight 2 doubles the gradient of weight 1."""
    results = []
    for weight in (1.0, 2.0):
        module = task(0.0)
        backward(module, Step(module, batch(), {"contrastive": weight}, 0.0, (1, "step", 2)), Accelerator(cpu=True))
        results.append(gradients(module))
    for name in results[0]:
        torch.testing.assert_close(2 * results[0][name], results[1][name])
