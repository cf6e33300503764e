"""Shares of a mean over all ranks' items."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mmssl.losses.ranks import ALONE, share


@dataclass(frozen=True)
class _Group:
    """Rank `rank` of a group whose ranks hold `counts` items."""

    rank: int
    counts: tuple[int, ...]

    @property
    def world_size(self) -> int:
        return len(self.counts)

    def gather(self, rows: Tensor) -> tuple[Tensor, int]:
        raise AssertionError("a share needs no features")

    def logsumexp(self, x: Tensor) -> Tensor:
        raise AssertionError("a share needs no features")

    def sum(self, x: Tensor) -> Tensor:
        assert x.item() == self.counts[self.rank]
        return torch.full_like(x, sum(self.counts))


def test_the_mean_of_the_shares_is_the_mean_of_all_items() -> None:
    """Also where the ranks hold different numbers of items, or none."""
    items = [torch.tensor([1.0, 2.0, 6.0]), torch.tensor([]), torch.tensor([7.0])]
    counts = tuple(len(part) for part in items)
    for as_tensor in (False, True):
        shares = [
            share(part.sum(), torch.tensor(float(len(part))) if as_tensor else len(part), _Group(rank, counts))
            for rank, part in enumerate(items)
        ]
        torch.testing.assert_close(torch.stack(shares).mean(), torch.cat(items).mean())


def test_nothing_anywhere_is_zero() -> None:
    """No item on any rank: a share of zero, with a gradient of zero."""
    x = torch.ones(3, requires_grad=True)
    value = share((0 * x).sum(), torch.tensor(0.0), ALONE)
    value.backward()
    assert value.item() == 0
    assert torch.equal(x.grad, torch.zeros(3))
