"""Losses of a global batch over several ranks, against one process on the whole batch, through real DDP."""

from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from mmssl.distributed import World
from mmssl.losses import blockwise, global_contrastive, info_nce, moco, nt_xent, siglip
from mmssl.losses.common import share
from mmssl.losses.logits import Form, correct_matches
from mmssl.losses.prediction import masked_patches
from mmssl.types import Groups
from tests.helpers.ranks import on_ranks

FORMS: tuple[Form, ...] = ("plain", "blocked")
NAMES = (
    *(f"{loss} {form}" for loss in ("info_nce", "siglip", "nt_xent") for form in (*FORMS, "ring")),
    *(
        f"{loss}+{groups} {form}"
        for loss in ("info_nce", "siglip")
        for groups in ("same", "mask")
        for form in (*FORMS, "ring")
    ),
    *(f"{loss} {form}" for loss in ("info_nce+smooth", "global") for form in (*FORMS, "ring")),
    "moco",
    "patches",
)
SIZES = {"even": (3, 3, 3, 3), "uneven": (5, 1, 4, 2)}
DTYPES = {"float32": torch.float32, "float64": torch.float64}


class Towers(nn.Module):
    """Two linear towers, a scale and a bias; the loss is taken inside the forward, as the trainer does."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = nn.Linear(6, 8, dtype=dtype), nn.Linear(5, 8, dtype=dtype)
        self.scale = nn.Parameter(torch.tensor(2.5, dtype=dtype))
        self.bias = nn.Parameter(torch.tensor(-3.0, dtype=dtype))

    def forward(self, name: str, batch: dict[str, Tensor], world: World) -> Tensor:
        left = F.normalize(self.left(batch["left"]), dim=1)
        right = F.normalize(self.right(batch["right"]), dim=1)
        # Every parameter takes part in every loss, or DDP would wait for those that do not.
        return _loss(name, left, right, self.scale.exp(), self.bias, batch, world) + 0 * self.scale * self.bias


def _loss(
    name: str,
    left: Tensor,
    right: Tensor,
    scale: Tensor,
    bias: Tensor,
    batch: dict[str, Tensor],
    world: World,
) -> Tensor:
    loss, _, way = name.partition(" ")
    loss, _, more = loss.partition("+")
    form: Form = "auto" if way in ("", "ring") else "plain" if way == "plain" else "blocked"
    numbers = torch.stack([batch["numbers"], batch["numbers"] % 5], 1)
    numbers = numbers[:, 1:] if more in ("same", "smooth") else numbers
    groups = Groups(numbers, numbers) if more else None
    if loss == "info_nce":
        smoothing = 0.3 if more == "smooth" else 0.0
        return info_nce(left, right, scale, world=world, form=form, groups=groups, label_smoothing=smoothing)
    if loss == "siglip":
        return siglip(left, right, scale, bias, world=world, form=form, groups=groups)
    if loss == "nt_xent":
        return nt_xent(left, right, 0.1, world=world, form=form)
    if loss == "global":
        return global_contrastive(left, right, scale, batch["estimates"], gamma=0.6, world=world, form=form)[0]
    if loss == "moco":
        return share(*moco(left, right, batch["queue"], 0.2), world) + 0 * right.sum()
    return share(*masked_patches(left, right, batch["mask"]), world)


def _batch(size: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(size)
    batch = {
        key: torch.randn(size, width, generator=generator, dtype=dtype) for key, width in (("left", 6), ("right", 5))
    }
    queue = F.normalize(torch.randn(7, 8, generator=generator, dtype=dtype), dim=1)
    batch["estimates"] = torch.randn(size, 2, generator=generator, dtype=dtype)
    return {**batch, "mask": torch.arange(size) % 3 != 1, "queue": queue, "numbers": torch.arange(size)}


_gather = World.gather


def _gather_numbers(world: World, rows: Tensor) -> tuple[Tensor, int]:
    """Over a ring, only one number per sample and one vector per rank are gathered."""
    assert rows.ndim == 1 or len(rows) == 1, "features were gathered"
    return _gather(world, rows)


def _outcome(name: str, module: nn.Module, batch: dict[str, Tensor], world: World) -> dict[str, Any]:
    module.zero_grad()
    # Blocks smaller than any rank's part, so that their borders fall everywhere.
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(blockwise, "block_shape", return_value=(2, 3)))
        if name.endswith("ring"):
            world = replace(world, ring=True)
            stack.enter_context(mock.patch.object(World, "gather", _gather_numbers))
        value = module(name, batch, world)
        value.backward()
    gradients = torch.cat([parameter.grad.flatten() for parameter in module.parameters()])
    return {"loss": value.item(), "gradients": gradients.numpy()}


def _all_outcomes(world: World) -> dict[tuple[str, str, str], dict[str, Any]]:
    outcomes = {}
    for dtype in DTYPES:
        module = DistributedDataParallel(Towers(DTYPES[dtype]))
        for spread, sizes in SIZES.items():
            start, size = sum(sizes[: world.rank]), sizes[world.rank]
            whole = _batch(sum(sizes[: world.size]), DTYPES[dtype])
            part = {k: v if k == "queue" else v[start : start + size] for k, v in whole.items()}
            for name in NAMES:
                outcomes[dtype, spread, name] = _outcome(name, module, part, world)
    return outcomes


@cache
def _over_ranks(world_size: int) -> list[dict[tuple[str, str, str], dict[str, Any]]]:
    return on_ranks(world_size, _all_outcomes)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("name", NAMES)
def test_shares_and_gradients_are_those_of_one_process(world_size: int, name: str) -> None:
    """The mean of the ranks' shares is the whole batch's loss, and DDP's averaged gradient is its gradient.

    For equal and unequal numbers of samples on the ranks; float64 to 1e-10, float32 to 1e-5 of the largest. Over a ring
    nothing is gathered.
    """
    for dtype, tolerance in (("float32", 1e-5), ("float64", 1e-10)):
        for spread, sizes in SIZES.items():
            batch = _batch(sum(sizes[:world_size]), DTYPES[dtype])
            plain = name.replace("blocked", "plain").replace("ring", "plain")
            expected = _outcome(plain, Towers(DTYPES[dtype]), batch, World())
            found = [outcomes[dtype, spread, name] for outcomes in _over_ranks(world_size)]
            np.testing.assert_allclose(
                np.mean([outcome["loss"] for outcome in found]), expected["loss"], rtol=tolerance
            )
            largest = np.abs(expected["gradients"]).max()
            assert largest > 1e-3
            for outcome in found:
                error = np.abs(outcome["gradients"] - expected["gradients"]).max() / largest
                assert error < tolerance, (dtype, spread, error)


def _picks(world: World, over_a_ring: bool, grouped: bool) -> list[bool]:
    start, size = sum(SIZES["uneven"][: world.rank]), SIZES["uneven"][world.rank]
    left, right = (_batch(12, torch.float32)[side][start : start + size, :5] for side in ("left", "right"))
    # Correlated, so that about half find their own.
    numbers = _batch(12, torch.float32)["numbers"][start : start + size, None] % 5
    groups = Groups(numbers, numbers) if grouped else None
    mine = correct_matches(0.3 * left + right, right, world=replace(world, ring=over_a_ring), groups=groups)
    found: list[bool] = mine.tolist()
    return found


@pytest.mark.parametrize("over_a_ring", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
def test_who_picks_their_own_among_all_ranks(over_a_ring: bool, grouped: bool) -> None:
    """As in one process: a row picks its own column, or one of its group, if no other rank has a closer one."""
    batch = _batch(12, torch.float32)
    left, right = batch["left"][:, :5], batch["right"]
    best = ((0.3 * left + right) @ right.T).argmax(1).tolist()
    expected = [j % 5 == i % 5 if grouped else j == i for i, j in enumerate(best)]
    assert 0 < sum(expected) < 12
    assert [pick for picks in on_ranks(4, _picks, over_a_ring, grouped) for pick in picks] == expected


def _unequal_upstream(world: World, name: str) -> Any:
    """Each rank's share times its own factor, backward without DDP."""
    module, batch = Towers(torch.float64), _batch(9, torch.float64)
    mine = {k: v[3 * world.rank : 3 * world.rank + 3] for k, v in batch.items()}
    world = replace(world, ring=name.endswith("ring"), equal_batches=True)
    ((world.rank + 1) * module(name, mine, world)).backward()
    return torch.cat([parameter.grad.flatten() for parameter in module.parameters()]).numpy()


@pytest.mark.parametrize(
    "loss", ["info_nce", "siglip", "nt_xent", "info_nce+same", "info_nce+smooth", "siglip+mask", "global"]
)
def test_the_ring_hands_back_what_each_rank_asks_for(loss: str) -> None:
    """Also where ranks weigh their shares differently, gradients through the ring are those through the gather."""
    over_ring, gathered = (on_ranks(3, _unequal_upstream, f"{loss} {way}") for way in ("ring", "plain"))
    for found, expected in zip(over_ring, gathered, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
