"""Pairs that belong together in a matrix of logits, block by block: those of the diagonal, or those of one group."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from mmssl.types import Groups

LEFT_OUT = -1e30
"""Logit of an entry left out of a sum. Not -inf, because -inf minus -inf is not a number."""


class Pairing(Protocol):
    """The positives of a matrix [n, N], and the entries that no sum counts.

    `rows` and `columns` are the place of a block in the matrix.
    """

    columns: tuple[Tensor, ...]
    """What travels with the columns round a ring, [N, ...] each."""

    def visiting(self, visit: int, width: int, columns: Sequence[Tensor]) -> "Pairing":
        """The pairing with the `width` columns of the rank that visits as number `visit`; 0 is this rank."""

    def read(self, logits: Tensor, rows: slice, columns: slice, positives: Tensor) -> None:
        """Add the logits of a block's positives to `positives` [n], by row. Then set entries left out to LEFT_OUT."""

    def add_gradient(self, gradient: Tensor, rows: slice, columns: slice, positive_gradient: Tensor) -> None:
        """Add the gradient [n] of what `read` summed to that of a block of logits, which is 0 where one is left out."""

    def negate(self, block: Tensor, rows: slice, columns: slice, left_out: float) -> None:
        """Change the sign of a block's positives, and set entries left out to `left_out`."""


class Diagonal:
    """The positive of row i is in column `offset` + i."""

    columns: tuple[Tensor, ...] = ()

    def __init__(self, offset: int = 0, left_out: bool = False) -> None:
        """`left_out`: sums leave the positives out."""
        self.offset, self.left_out = offset, left_out

    def visiting(self, visit: int, width: int, columns: Sequence[Tensor]) -> "Diagonal":
        """Beyond the edge of the columns of other ranks."""
        return self if visit == 0 else Diagonal(width, self.left_out)

    def read(self, logits: Tensor, rows: slice, columns: slice, positives: Tensor) -> None:
        """As `Pairing`."""
        crossed, values = self._cross(logits, rows, columns)
        positives[crossed] = values
        if self.left_out:
            values.fill_(LEFT_OUT)

    def add_gradient(self, gradient: Tensor, rows: slice, columns: slice, positive_gradient: Tensor) -> None:
        """As `Pairing`."""
        crossed, values = self._cross(gradient, rows, columns)
        if self.left_out:
            values.zero_()
        values.add_(positive_gradient[crossed])

    def negate(self, block: Tensor, rows: slice, columns: slice, left_out: float) -> None:
        """As `Pairing`."""
        self._cross(block, rows, columns)[1].neg_()

    def _cross(self, block: Tensor, rows: slice, columns: slice) -> tuple[slice, Tensor]:
        """The rows in which the diagonal crosses this block, and a view of the block's values there."""
        first = self.offset + rows.start - columns.start
        values = block.diagonal(first)
        start = rows.start + max(0, -first)
        return slice(start, start + len(values)), values


class Grouped:
    """Positives share the first number of `Groups`; pairs that share only the second are left out."""

    def __init__(self, groups: Groups) -> None:
        """`groups`: of this rank's rows and of the matrix's columns."""
        self._rows = groups.left
        self.columns: tuple[Tensor, ...] = (groups.right,)

    def visiting(self, visit: int, width: int, columns: Sequence[Tensor]) -> "Grouped":
        """With the groups that travelled along."""
        return Grouped(Groups(self._rows, columns[0]))

    def read(self, logits: Tensor, rows: slice, columns: slice, positives: Tensor) -> None:
        """As `Pairing`."""
        same, left_out = self.marks(rows, columns)
        positives[rows] += torch.where(same, logits, 0).sum(1)
        if left_out is not None:
            logits.masked_fill_(left_out, LEFT_OUT)

    def add_gradient(self, gradient: Tensor, rows: slice, columns: slice, positive_gradient: Tensor) -> None:
        """As `Pairing`."""
        same, left_out = self.marks(rows, columns)
        if left_out is not None:
            gradient.masked_fill_(left_out, 0)
        gradient.addcmul_(same.to(gradient.dtype), positive_gradient[rows, None])

    def negate(self, block: Tensor, rows: slice, columns: slice, left_out: float) -> None:
        """As `Pairing`."""
        same, masked = self.marks(rows, columns)
        block.mul_(1 - 2 * same.to(block.dtype))
        if masked is not None:
            block.masked_fill_(masked, left_out)

    def marks(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor | None]:
        """The positives of a block and the entries left out, both bool; None if there are none by design."""
        left, right = self._rows[rows], self.columns[0][columns]
        same = left[:, None, 0] == right[None, :, 0]
        if left.shape[1] == 1:
            return same, None
        return same, (left[:, None, 1] == right[None, :, 1]) & ~same


def group_sizes(own: Tensor, everyone: Tensor) -> Tensor:
    """Number of entries of `everyone` [N] that equal each of `own` [n], int64 [n]; without a matrix."""
    ordered = everyone.sort().values
    return torch.searchsorted(ordered, own, right=True) - torch.searchsorted(ordered, own)
