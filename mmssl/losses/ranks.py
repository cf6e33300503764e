"""What a loss over the global batch needs to know of the other ranks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Ranks(Protocol):
    """The ranks that share a global batch: rank r holds the r-th run of its rows.

    Runs may differ in length.
    """

    @property
    def rank(self) -> int:
        """This one, from 0."""

    @property
    def size(self) -> int:
        """How many there are."""

    @property
    def ring(self) -> bool:
        """Features go round the ranks part by part; else each rank gathers all of them."""

    def ring_shift(self, *rows: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        """Begin to send rows [n, ...] to the rank before this one, round the ring.

        The result waits for those [m, ...] of the rank after. Carries no gradient.
        """

    def gather(self, rows: Tensor) -> tuple[Tensor, int]:
        """Every rank's rows [n, ...] in rank order [N, ...], and where this rank's begin.

        Differentiable: the gradient of a rank's rows is the sum of what all ranks send back to them.
        """

    def logsumexp(self, x: Tensor) -> Tensor:
        """Elementwise log of the sum over ranks of exp(x). Differentiable, likewise."""

    def sum(self, x: Tensor) -> Tensor:
        """Elementwise sum over ranks. Carries no gradient."""


@dataclass(frozen=True)
class _Alone:
    rank: int = 0
    size: int = 1
    ring: bool = False

    def ring_shift(self, *rows: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: rows

    def gather(self, rows: Tensor) -> tuple[Tensor, int]:
        return rows, 0

    def logsumexp(self, x: Tensor) -> Tensor:
        return x

    def sum(self, x: Tensor) -> Tensor:
        return x.detach()


ALONE: Ranks = _Alone()
"""One process holds the whole batch."""


def share(total: Tensor, count: Tensor | int, world: Ranks) -> Tensor:
    """This rank's share of the mean over all ranks' items: `total` sums this rank's, `count` says how many.

    Zero where no rank has an item.
    """
    counted = count if isinstance(count, Tensor) else total.new_full((), count)
    return total * (world.size / world.sum(counted).clamp(min=1))
