"""Losses of a global batch over several ranks, against one process on the whole batch, through real DDP."""

from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from mmssl.distributed import Processes
from mmssl.losses import blocked
from mmssl.losses.contrastive import info_nce
from mmssl.losses.logits import Form
from mmssl.losses.moco import moco
from mmssl.losses.nt_xent import nt_xent
from mmssl.losses.patches import masked_patches
from mmssl.losses.ranks import ALONE, Ranks, share
from mmssl.losses.siglip import siglip
from tests.gloo import on_ranks

FORMS: tuple[Form, ...] = ("plain", "blocked")
NAMES = (
    *(f"{loss} {form}" for loss in ("info_nce", "siglip", "nt_xent") for form in FORMS),
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

    def forward(self, name: str, batch: dict[str, Tensor], ranks: Ranks) -> Tensor:
        left = F.normalize(self.left(batch["left"]), dim=1)
        right = F.normalize(self.right(batch["right"]), dim=1)
        # Every parameter takes part in every loss, or DDP would wait for those that do not.
        return _loss(name, left, right, self.scale.exp(), self.bias, batch, ranks) + 0 * self.scale * self.bias


def _loss(
    name: str,
    left: Tensor,
    right: Tensor,
    scale: Tensor,
    bias: Tensor,
    batch: dict[str, Tensor],
    ranks: Ranks,
) -> Tensor:
    loss, _, form = name.partition(" ")
    if loss == "info_nce":
        return info_nce(left, right, scale, ranks=ranks, form=form)
    if loss == "siglip":
        return siglip(left, right, scale, bias, ranks=ranks, form=form)
    if loss == "nt_xent":
        return nt_xent(left, right, 0.1, ranks=ranks, form=form)
    if loss == "moco":
        return share(*moco(left, right, batch["queue"], 0.2), ranks) + 0 * right.sum()
    return share(*masked_patches(left, right, batch["mask"]), ranks)


def _batch(size: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(size)
    batch = {
        key: torch.randn(size, width, generator=generator, dtype=dtype) for key, width in (("left", 6), ("right", 5))
    }
    queue = F.normalize(torch.randn(7, 8, generator=generator, dtype=dtype), dim=1)
    return {**batch, "mask": torch.arange(size) % 3 != 1, "queue": queue}


def _outcome(name: str, module: nn.Module, batch: dict[str, Tensor], ranks: Ranks) -> dict[str, Any]:
    module.zero_grad()
    # Blocks smaller than any rank's part, so that their borders fall everywhere.
    with mock.patch.object(blocked, "block_shape", return_value=(2, 3)):
        value = module(name, batch, ranks)
        value.backward()
    gradients = torch.cat([parameter.grad.flatten() for parameter in module.parameters()])
    return {"loss": value.item(), "gradients": gradients.numpy()}


def _all_outcomes(ranks: Processes) -> dict[tuple[str, str, str], dict[str, Any]]:
    outcomes = {}
    for dtype in DTYPES:
        module = DistributedDataParallel(Towers(DTYPES[dtype]))
        for spread, sizes in SIZES.items():
            start, size = sum(sizes[: ranks.rank]), sizes[ranks.rank]
            whole = _batch(sum(sizes[: ranks.world]), DTYPES[dtype])
            part = {k: v if k == "queue" else v[start : start + size] for k, v in whole.items()}
            for name in NAMES:
                outcomes[dtype, spread, name] = _outcome(name, module, part, ranks)
    return outcomes


@cache
def _over_ranks(world: int) -> list[dict[tuple[str, str, str], dict[str, Any]]]:
    return on_ranks(world, _all_outcomes)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("name", NAMES)
def test_shares_and_gradients_are_those_of_one_process(world: int, name: str) -> None:
    """The mean of the ranks' shares is the whole batch's loss, and DDP's averaged gradient is its gradient.

    For equal and unequal numbers of samples on the ranks; float64 to 1e-10, float32 to 1e-5 of the largest.
    """
    for dtype, tolerance in (("float32", 1e-5), ("float64", 1e-10)):
        for spread, sizes in SIZES.items():
            batch = _batch(sum(sizes[:world]), DTYPES[dtype])
            plain = name.replace("blocked", "plain")
            expected = _outcome(plain, Towers(DTYPES[dtype]), batch, ALONE)
            found = [outcomes[dtype, spread, name] for outcomes in _over_ranks(world)]
            np.testing.assert_allclose(
                np.mean([outcome["loss"] for outcome in found]), expected["loss"], rtol=tolerance
            )
            largest = np.abs(expected["gradients"]).max()
            assert largest > 1e-3
            for outcome in found:
                error = np.abs(outcome["gradients"] - expected["gradients"]).max() / largest
                assert error < tolerance, (dtype, spread, error)
