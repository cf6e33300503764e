"""What every objective promises, whichever there are."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import DistributedDataParallelKwargs
from torch.nn.parallel import DistributedDataParallel

from mmssl.config import ObjectiveConfig
from mmssl.distributed import World
from mmssl.objectives import objective_names
from mmssl.objectives._mixing import TrainingTask
from mmssl.train.parallel import configure_ddp
from mmssl.train.step import Step, Tally, backward
from tests.helpers.objective_batch import RESNET, ROWS, Plain, batch, part, tiny_task
from tests.helpers.ranks import on_ranks

STEPS = 30
LR = 3e-3
NAMES = objective_names()
CHANCE = {"moco": 1 / (2 * ROWS + 1), "simclr": 1 / (2 * ROWS - 1), "redundancy": 1 / ROWS, "replaced_tokens": 0.5}
"""What guessing reaches, where a metric starts above it: tiny random towers tell these few images apart at once.
Elsewhere the metric starts at chance."""
BATCHES = {"moco": 3}
"""Batches that take turns, so that a queue does not hold the very images it is compared with; elsewhere one."""
LENGTHS = {"replaced_tokens": 80, "frames": 80}
"""Steps of objectives that need more of them."""
TOWERS = {"rotation": RESNET, "jigsaw": RESNET}
"""Vision towers that learn the task in so few steps; elsewhere a ViT."""
RISE = 0.15
"""How far above chance the first metric must be at the end."""


def train(task: TrainingTask, name: str, start: int = 0, stop: int = STEPS) -> list[float]:
    """Steps on one batch; returns the objective's first metric at each."""
    optimizer = torch.optim.Adam([p for p in task.parameters() if p.requires_grad], lr=LR)
    return [step(task, name, optimizer, i) for i in range(start, stop)]


def step(task: TrainingTask, name: str, optimizer: torch.optim.Optimizer, i: int) -> float:
    """One update; the objective's first metric."""
    tally = gradient(task, name, i)
    optimizer.step()
    optimizer.zero_grad()
    metric = next(key for key in tally.sums if key.startswith(f"{name}.") and key != f"{name}.loss")
    total, count = tally.sums[metric]
    return float(total / count)


def gradient(task: TrainingTask, name: str, i: int, micro_batch: int | None = None) -> Tally:
    given = batch(task, i % BATCHES.get(name, 1))
    return backward(task, Step(task, given, {name: 1.0}, 0.5, (0, "step", i), micro_batch), Plain())


def gradients(task: TrainingTask) -> dict[str, np.ndarray]:
    return {name: p.grad.numpy().copy() for name, p in task.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Within 1e-5 of each gradient's largest entry (or of 1e-4, where it is zero but for rounding)."""
    touched = {name for name, g in expected.items() if np.abs(g).max() > 0}
    assert touched <= found.keys()
    for name, g in found.items():
        reference = expected.get(name, np.zeros_like(g))
        assert np.abs(g - reference).max() <= 1e-5 * max(np.abs(reference).max(), 1e-4), name


@pytest.mark.parametrize("name", NAMES)
def test_its_metric_rises(name: str) -> None:
    """In a few steps on a tiny problem the objective's own metric rises clearly above chance."""
    metrics = train(tiny_task([name], TOWERS.get(name)), name, stop=LENGTHS.get(name, STEPS))
    assert all(map(math.isfinite, metrics))
    assert np.mean(metrics[-5:]) > CHANCE.get(name, np.mean(metrics[:2])) + RISE, metrics


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_run(name: str) -> None:
    """Two runs of five steps end with bit-identical weights, queues and momentum encoders."""
    first, second = tiny_task([name]), tiny_task([name])
    train(first, name, stop=5)
    train(second, name, stop=5)
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key


@pytest.mark.parametrize("name", NAMES)
def test_its_state_is_in_the_checkpoint(name: str) -> None:
    """A mixer that takes over the state dict after three steps has the next gradients bit by bit."""
    trained, fresh = tiny_task([name]), tiny_task([name])
    train(trained, name, stop=3)
    fresh.load_state_dict({key: value.clone() for key, value in trained.state_dict().items()})
    for task in (trained, fresh):
        task.zero_grad()
        gradient(task, name, 3)
    expected = gradients(trained)
    found = gradients(fresh)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", NAMES)
def test_any_micro_batch_gives_the_same_gradient(name: str) -> None:
    """Micro-batches of 5, with a leftover, give the gradient of the whole batch, and the same loss and metrics."""
    whole, parts = tiny_task([name]), tiny_task([name])
    expected, found = gradient(whole, name, 0), gradient(parts, name, 0, 5)
    assert_same(gradients(parts), gradients(whole))
    assert found.sums.keys() == expected.sums.keys()
    for key, pair in expected.sums.items():
        assert torch.allclose(found.sums[key], pair, rtol=1e-4, atol=1e-4), key


def under_ddp(world: World, name: str) -> dict[str, np.ndarray]:
    """Two steps under DDP on one process's rows: queues filled by the first act in the second."""
    task = tiny_task([name], world=world)
    model = DistributedDataParallel(task, find_unused_parameters=True)
    for i in range(2):
        task.zero_grad()
        mine = part(batch(task, i % BATCHES.get(name, 1)), world)
        backward(model, Step(task, mine, {name: 1.0}, 0.5, (0, "step", i)), Plain())
    return gradients(task)


def search_beside_contrastive(world: World, name: str) -> list[bool]:
    """Whether DDP is told to search for weights without a gradient, where an objective beside contrastive rests at
    times, and where it does not. Then two steps under DDP, which stops at a weight that it waited for in vain."""
    task = tiny_task([*dict.fromkeys(["contrastive", name])], world=world)
    accelerator: Any = Plain()
    accelerator.distributed_type, accelerator.ddp_handler = "MULTI_CPU", DistributedDataParallelKwargs()
    always = {key: ObjectiveConfig() for key in task.names}
    searches = []
    for schedules in ({**always, name: ObjectiveConfig(every=2)}, always):
        configure_ddp(accelerator, task, schedules)
        searches.append(accelerator.ddp_handler.find_unused_parameters)
    model = DistributedDataParallel(task, **accelerator.ddp_handler.to_kwargs())
    for i in range(2):
        mine = part(batch(task, i), world)
        backward(model, Step(task, mine, dict.fromkeys(task.names, 1.0), 0.5, (0, "step", i)), Plain())
    return searches


Found = dict[str, tuple[dict[str, np.ndarray], list[bool]]]


def on_one_rank(world: World) -> Found:
    return {name: (under_ddp(world, name), search_beside_contrastive(world, name)) for name in NAMES}


@pytest.fixture(scope="module")
def two_processes() -> list[Found]:
    """What each of two gloo processes found, for every objective."""
    return on_ranks(2, on_one_rank)


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_give_the_gradient_of_one(name: str, two_processes: list[Found]) -> None:
    """The gradient that DDP averages over two gloo processes is that of one process on the whole batch."""
    task = tiny_task([name])
    for i in range(2):
        task.zero_grad()
        gradient(task, name, i)
    assert ROWS % 2 == 0
    for found in two_processes:
        assert_same(found[name][0], gradients(task))


@pytest.mark.parametrize("name", NAMES)
def test_beside_contrastive_every_weight_gets_a_gradient(name: str, two_processes: list[Found]) -> None:
    """Where all objectives act at every step, DDP need not search the graph for weights without a gradient, and is not
    told to; where one rests, it is."""
    assert [found[name][1] for found in two_processes] == [[True, False]] * 2
