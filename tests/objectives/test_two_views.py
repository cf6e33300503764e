"""Redundancy reduction and BYOL, which share simclr's views."""

from typing import Any

import numpy as np
import pytest
import torch
from lightly.loss import BarlowTwinsLoss, NegativeCosineSimilarity, VICRegLoss
from lightly.utils.scheduler import cosine_schedule
from torch import Tensor

from mmssl.distributed import World
from mmssl.errors import UserError
from mmssl.losses.redundancy import barlow_twins, vicreg
from mmssl.models.heads import unit
from mmssl.objectives._mixing import TrainingTask, encoder_passes
from mmssl.objectives._momentum import momentum_at
from mmssl.objectives.byol import Byol
from mmssl.objectives.simclr import STRONG_VIEW
from mmssl.rng import RowRandom
from tests.helpers.objective_batch import ALONE, ROWS, batch, tiny_task
from tests.helpers.ranks import on_ranks

DIM = 6


def views() -> list[Tensor]:
    """Two views [8, DIM] that resemble each other, some dimensions with a small deviation."""
    g = torch.Generator().manual_seed(0)
    first = torch.randn(8, DIM, generator=g, dtype=torch.float64) * torch.linspace(0.2, 2, DIM) + 3
    return [first, first + 0.5 * torch.randn(8, DIM, generator=g, dtype=torch.float64)]


LOSSES: dict[str, Any] = {
    "barlow": lambda a, b, world=ALONE: barlow_twins(a, b, 0.01, world=world),
    "vicreg": lambda a, b, world=ALONE: vicreg(a, b, 2.0, 3.0, 0.5, world=world),
}
PEERS: dict[str, Any] = {
    "barlow": lambda a, b: BarlowTwinsLoss(lambda_param=0.01)(a, b) / DIM,
    "vicreg": lambda a, b: VICRegLoss(lambda_param=2.0, mu_param=3.0, nu_param=0.5)(a, b),
}


def with_gradients(loss: Any, pair: list[Tensor], *more: Any) -> tuple[float, list[np.ndarray]]:
    leaves = [x.clone().requires_grad_() for x in pair]
    value = loss(*leaves, *more)
    return float(value.detach()), [g.numpy() for g in torch.autograd.grad(value, leaves)]


@pytest.mark.parametrize("name", LOSSES)
def test_redundancy_losses_are_lightlys(name: str) -> None:
    """Value and gradients equal lightly's BarlowTwinsLoss (divided by the dimensions) and VICRegLoss."""
    found, expected = with_gradients(LOSSES[name], views()), with_gradients(PEERS[name], views())
    assert found[0] == pytest.approx(expected[0])
    for mine, theirs in zip(found[1], expected[1], strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-9)


def half(world: World) -> dict[str, tuple[float, list[np.ndarray]]]:
    pair = [x[4 * world.rank : 4 * world.rank + 4] for x in views()]
    return {name: with_gradients(loss, pair, world) for name, loss in LOSSES.items()}


def test_the_statistics_are_those_of_all_ranks() -> None:
    """On each of two ranks the loss is that of all rows, and the mean of the gradients too."""
    ranks = on_ranks(2, half)
    for name, loss in LOSSES.items():
        value, gradients = with_gradients(loss, views())
        assert [rank[name][0] for rank in ranks] == pytest.approx([value, value])
        for place, whole in enumerate(gradients):
            joined = np.concatenate([rank[name][1][place] for rank in ranks]) / 2
            np.testing.assert_allclose(joined, whole, atol=1e-12)


def prepared(task: TrainingTask, name: str) -> dict[str, Tensor]:
    random = RowRandom(torch.Generator().manual_seed(1), 0, ROWS, ROWS)
    return task.inputs(batch(task), [name], lambda _: random, 0.5)


@pytest.mark.parametrize("kind", ["barlow", "vicreg"])
def test_redundancy_reads_two_views(kind: str) -> None:
    """The objective's loss is the named one on the head's vectors of the two views, with its default weights."""
    task = tiny_task(["redundancy"], options={"kind": kind, "head_dim": 8})
    objective, inputs = task.objective("redundancy"), prepared(task, "redundancy")
    vectors = [objective.head(task.encoder.vision(inputs[f"view.simclr_{i}"]).pooled) for i in (1, 2)]
    peer = BarlowTwinsLoss() if kind == "barlow" else VICRegLoss()
    expected = peer(*vectors) / (8 if kind == "barlow" else 25)
    found = objective.loss(task.predict(inputs, ["redundancy"])["redundancy"], inputs, World()).total
    torch.testing.assert_close(found, expected)


def test_byol_is_grills() -> None:
    """The target of each view is the momentum encoder's vector of the other one, after it has followed the encoder; the
    loss is 2 plus twice lightly's NegativeCosineSimilarity averaged over both directions, and so are its gradients."""
    task = tiny_task(["byol"])
    byol = task.objective("byol")
    assert isinstance(byol, Byol)
    with torch.no_grad():
        before = [p.clone() for p in byol.slow.parameters()]
        fast = [*task.encoder.vision.parameters(), *byol.head.parameters()]
        for parameter in fast:
            parameter.add_(0.1 * torch.randn_like(parameter))
    inputs = prepared(task, "byol")
    momentum = cosine_schedule(50, 101, 0.9, 1.0)
    for slow, old, new in zip(byol.slow.parameters(), before, fast, strict=True):
        torch.testing.assert_close(slow, momentum * old + (1 - momentum) * new)
    predictions = task.predict(inputs, ["byol"])["byol"]
    leaves = {k: v.detach().requires_grad_() for k, v in predictions.items()}
    slow = byol.slow.average
    targets = [unit(slow["head"](slow["vision"](inputs[f"view.simclr_{i}"]).pooled)).detach() for i in (1, 2)]
    found = byol.loss(leaves, inputs, World()).total / ROWS
    peer = NegativeCosineSimilarity()
    expected = 2 + peer(leaves["first"], targets[1]) + peer(leaves["second"], targets[0])
    torch.testing.assert_close(found, expected)
    own, theirs = (torch.autograd.grad(x, list(leaves.values())) for x in (found, expected))
    for mine, other, vector in zip(own, theirs, leaves.values(), strict=True):
        # Ours takes unit vectors; lightly's normalises, which drops the part of the gradient along them.
        along = (mine * vector).sum(1, keepdim=True) * vector
        torch.testing.assert_close(mine - along, other, rtol=1e-4, atol=1e-6)


def test_the_momentum_rises_as_lightlys_cosine_schedule() -> None:
    """From its start to 1."""
    expected = [cosine_schedule(step, 11, 0.99, 1.0) for step in range(11)]
    assert [momentum_at(0.99, step / 10) for step in range(11)] == pytest.approx(expected)


def test_the_momentum_encoder_is_still_and_keeps_buffers() -> None:
    """It stays in evaluation mode in training, and takes over the batch norms' statistics."""
    resnet = {"name": "timm:resnet10t", "image_size": 32, "options": {"channels": [8, 8, 8, 8]}}
    byol = (task := tiny_task(["byol"], resnet)).objective("byol")
    assert byol.training
    assert not any(module.training for module in byol.slow.modules())
    with torch.no_grad():
        for buffer in task.encoder.vision.buffers():
            buffer.add_(1)
    byol.slow.follow({"vision": task.encoder.vision, "head": byol.head}, 0.5)
    followed = dict(task.encoder.vision.named_buffers())
    for name, buffer in byol.slow.average["vision"].named_buffers():
        assert torch.equal(buffer, followed[name]), name


def test_the_three_share_two_passes() -> None:
    """simclr, redundancy and byol encode two views once; with another view for one of them, a mix is refused."""
    names = ["simclr", "redundancy", "byol"]
    task = tiny_task(names, options={"head_dim": 8})
    assert [p.input for p in encoder_passes(map(task.objective, names))] == ["view.simclr_1", "view.simclr_2"]
    assert task.required_views() == {"simclr_1": STRONG_VIEW, "simclr_2": STRONG_VIEW}
    task.objective("byol").requested["simclr_2"] = STRONG_VIEW.model_copy(update={"gray": 1.0})
    with pytest.raises(UserError, match=r"objectives\.byol\.view differs.*shares the view simclr_2"):
        task.required_views()
    one = tiny_task(["byol", "contrastive"], options=None)
    byol = tiny_task(["byol"], options={"with_main": True}).objective("byol")
    assert [p.input for p in encoder_passes([byol, one.objective("contrastive")])] == [
        "view.main",
        "view.simclr_2",
        "tokens",
    ]
