"""The losses' sums over the matrix of logits while features travel round the ranks, so that none holds them all.

Each rank keeps its rows and is visited by one rank's columns after the other, first by its own. What adds up over the
rows (a column's log-sum-exp, a column's gradient) travels with the columns and is back home after one round. Beside
its own features a rank holds those of two others, those it works on and those on their way: O(N / W) in place of O(N).

All sums are blocked. Of products of features InfoNCE and SigLIP take 4: 1 forward, and backward 1 anew and 2 for the
gradients.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmssl.losses.blocks import (
    Blocks,
    Gradients,
    add_logsumexp_gradients,
    add_logsumexps,
    add_sigmoid_losses,
    block_shape,
)
from mmssl.losses.ranks import Ranks

_ALL = (True, True, True)


def logsumexps(
    left: Tensor, right: Tensor, scale: Tensor, without_diagonal: bool, world: Ranks
) -> tuple[Tensor, Tensor, Tensor]:
    """As `mmssl.losses.logits.logsumexps`. Differentiable once, in the three tensors."""
    rows, columns, diagonal = _LogSumExps.apply(left, right, scale, without_diagonal, world)
    return rows, columns, diagonal


def sigmoid_loss(left: Tensor, right: Tensor, scale: Tensor, bias: Tensor, world: Ranks) -> Tensor:
    """As `mmssl.losses.logits.sigmoid_loss`. Differentiable once, in the four tensors."""
    total: Tensor = _SigmoidLoss.apply(left, right, scale, bias, world)
    return total


@torch.no_grad()
def nearest(left: Tensor, right: Tensor, world: Ranks) -> Tensor:
    """The column of the greatest product with each row, int64 [n], counted from this rank's first column round the
    ring. Each rank may have another number of rows."""
    best = left.new_full((len(left),), -torch.inf)
    place = torch.zeros(len(left), dtype=torch.int64, device=left.device)
    start = 0
    for (columns,) in visitors(world, right):
        most, index = (left @ columns.T).max(1)
        place = torch.where(most > best, index + start, place)
        best = torch.maximum(best, most)
        start += len(columns)
    return place


def visitors(world: Ranks, *columns: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Every rank's columns, this rank's own first; the next ones come while these are worked on."""
    for following in reversed(range(world.size)):
        arrival = world.ring_shift(*columns) if following else None
        yield columns
        if arrival is not None:
            columns = arrival()


class _LogSumExps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, left: Tensor, right: Tensor, scale: Tensor, without_diagonal: bool, world: Ranks
    ) -> tuple[Tensor, Tensor, Tensor]:
        row_lse = left.new_full((len(left),), -torch.inf)
        column_lse = right.new_full((len(right),), -torch.inf)
        diagonal = torch.empty_like(row_lse)
        for visit, (columns,) in enumerate(visitors(world, right)):
            blocks = _blocks(left, columns, scale, visit)
            add_logsumexps(blocks, row_lse, column_lse, diagonal, without_diagonal)
            (column_lse,) = world.ring_shift(column_lse)()
        ctx.save_for_backward(left, right, scale, row_lse, column_lse)
        ctx.without_diagonal, ctx.world = without_diagonal, world
        return row_lse, column_lse, diagonal

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, row_gradient: Tensor, column_gradient: Tensor, diagonal_gradient: Tensor
    ) -> tuple[Tensor | None, ...]:
        left, right, scale, row_lse, column_lse = ctx.saved_tensors
        of_left, of_right, of_scale = torch.zeros_like(left), torch.zeros_like(right), torch.zeros_like(scale)
        by_row = row_lse, row_gradient
        with torch.autocast(left.device.type, enabled=False):
            visits = enumerate(visitors(ctx.world, right, column_lse, column_gradient))
            for visit, (columns, *by_column) in visits:
                gradients = Gradients(left, columns, scale, _ALL)
                blocks = _blocks(left, columns, scale, visit)
                add_logsumexp_gradients(
                    blocks, by_row, (by_column[0], by_column[1]), diagonal_gradient, ctx.without_diagonal, gradients
                )
                of_left, of_right, of_scale = _added((of_left, of_right, of_scale), gradients)
                (of_right,) = ctx.world.ring_shift(of_right)()
        return of_left, of_right, of_scale, None, None


class _SigmoidLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, scale: Tensor, bias: Tensor, world: Ranks) -> Tensor:
        total = left.new_zeros(())
        for visit, (columns,) in enumerate(visitors(world, right)):
            total += add_sigmoid_losses(_blocks(left, columns, scale, visit), bias, None)[0]
        ctx.save_for_backward(left, right, scale, bias)
        ctx.world = world
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # Not found on the way forward: the gradient may differ between ranks, and columns visit them all.
        left, right, scale, bias = ctx.saved_tensors
        of_left, of_right, of_scale = torch.zeros_like(left), torch.zeros_like(right), torch.zeros_like(scale)
        of_bias = torch.zeros_like(bias)
        with torch.autocast(left.device.type, enabled=False):
            for visit, (columns,) in enumerate(visitors(ctx.world, right)):
                gradients = Gradients(left, columns, scale, _ALL)
                of_bias += add_sigmoid_losses(_blocks(left, columns, scale, visit), bias, gradients)[1]
                of_left, of_right, of_scale = _added((of_left, of_right, of_scale), gradients, gradient)
                (of_right,) = ctx.world.ring_shift(of_right)()
        return of_left, of_right, of_scale, gradient * of_bias, None


def _blocks(left: Tensor, columns: Tensor, scale: Tensor, visit: int) -> Blocks:
    """The matrix of a visit. The diagonal lies in that of one's own columns, and beyond the others' edge."""
    return Blocks(left, columns, scale, 0 if visit == 0 else len(columns), block_shape(left.device))


def _added(
    sums: tuple[Tensor, Tensor, Tensor], gradients: Gradients, factor: Tensor | float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums for left, right and scale, with a visit's gradients."""
    found = gradients.finished()
    left, right, scale = (total + factor * part for total, part in zip(sums, found, strict=True) if part is not None)
    return left, right, scale
