"""Batch norm over processes is batch norm over the joined batch."""

import numpy as np
import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from mmssl.distributed import World
from mmssl.models.batch_norm import synchronize_batch_norm, uncounted
from mmssl.rng import RowRandom
from tests.helpers import objective_batch
from tests.helpers.objective_batch import batch, tiny_task
from tests.helpers.ranks import on_ranks

ROWS = 12


def network(kind: str) -> nn.Module:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4) if kind == "plain" else BatchNormAct2d(4)
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.Conv2d(4, 2, 3))


def data() -> torch.Tensor:
    return torch.randn(ROWS, 3, 7, 7, generator=torch.Generator().manual_seed(1)) * 3 + 1


def run(module: nn.Module, x: torch.Tensor, scale: float) -> dict[str, np.ndarray]:
    """Gradients of a sum over samples, and the running statistics after the forward."""
    (module(x).pow(3).sum() * scale).backward()
    gradients = {n: p.grad.numpy() for n, p in module.named_parameters() if p.grad is not None}
    return gradients | {n: b.numpy() for n, b in module.named_buffers()}


def part(world: World, kind: str, cuts: list[int]) -> dict[str, np.ndarray]:
    """One process's share of the batch through the synchronised network."""
    module = network(kind)
    synchronize_batch_norm(module, world, torch.device("cpu"))
    return run(module, data()[cuts[world.rank] : cuts[world.rank + 1]], 1e-3)


@pytest.mark.parametrize("kind", ["plain", "with_activation"])
@pytest.mark.parametrize("cuts", [[0, 6, 12], [0, 1, 5, 12]], ids=["even", "uneven"])
def test_processes_together_are_one_process(kind: str, cuts: list[int]) -> None:
    """Summed over processes, gradients equal those of one process on the whole batch; running statistics equal too."""
    expected = run(network(kind), data(), 1e-3)
    parts = on_ranks(len(cuts) - 1, part, kind, cuts)
    for name, value in expected.items():
        found = parts[0][name] if name.split(".")[-1].startswith(("running", "num")) else sum(p[name] for p in parts)
        np.testing.assert_allclose(found, value, rtol=2e-4, atol=1e-5, err_msg=name)


def test_one_process_and_evaluation_are_unchanged() -> None:
    """On one process a synchronised ResNet gives timm's own output in training and in evaluation, names unchanged."""
    torch.manual_seed(0)
    plain = timm.create_model("resnet10t", num_classes=3)
    torch.manual_seed(0)
    other = timm.create_model("resnet10t", num_classes=3)
    synchronize_batch_norm(other, World(), torch.device("cpu"))
    assert plain.state_dict().keys() == other.state_dict().keys()
    x = torch.randn(4, 3, 32, 32)
    for mode in (True, False):
        torch.testing.assert_close(other.train(mode)(x), plain.train(mode)(x), rtol=1e-4, atol=1e-4)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("kind", ["plain", "with_activation", "over processes"])
def test_uncounted_passes_leave_the_running_statistics(kind: str, momentum: float | None) -> None:
    """Outputs and gradients of an uncounted pass are those of a counted one, at the same statistics before and after;
    the next pass counts again."""
    module = network(kind)
    module[1].momentum = momentum
    if kind == "over processes":
        synchronize_batch_norm(module, World(), torch.device("cpu"))
    module(data())
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    with uncounted(module):
        found = run(module, data() * 2, 1e-3)
    assert all(torch.equal(buffer, before[name]) for name, buffer in module.named_buffers())
    module.zero_grad()
    expected = run(module, data() * 2, 1e-3)
    for name, _ in module.named_parameters():
        np.testing.assert_array_equal(found[name], expected[name])
    assert not any(torch.equal(buffer, before[name]) for name, buffer in module.named_buffers())


@pytest.mark.parametrize("other", ["maskfeat", "mae", "simclr", "rotation"])
def test_running_statistics_are_those_of_plain_images(other: str) -> None:
    """Beside contrastive, an objective with changed images leaves the running statistics of a ResNet as contrastive
    alone does; by itself it changes them, as no other images are there."""
    resnet = {"name": "timm:resnet10t", "options": {"channels": [8, 8, 16, 16], "stem_width": 8}}
    found = {}
    for names in (["contrastive"], ["contrastive", other], [other]):
        task = tiny_task(names, changes=resnet)
        random = RowRandom(torch.Generator().manual_seed(1), 0, objective_batch.ROWS, objective_batch.ROWS)
        inputs = task.inputs(batch(task), names, lambda _: random, 0.0)  # noqa: B023
        task.predict(inputs, names)
        found[tuple(names)] = {k: v for k, v in task.encoder.vision.state_dict().items() if "running" in k}
    alone, beside, itself = found.values()
    assert alone
    assert all(torch.equal(value, beside[name]) for name, value in alone.items())
    assert not any(torch.equal(value, itself[name]) for name, value in alone.items())
