"""Sums over a matrix of logits in blocks, with the columns of one process or of each rank in turn.

A backward pass computes blocks anew, so memory is O(n + N) instead of O(n N). InfoNCE takes four products of
the matrix's size (one forward, one anew and two for the gradients backward) and SigLIP three; the plain forms
take three, but from some size on moving the matrix costs more than a product.

Over a ring (`world.ring`), each rank keeps its rows and receives one rank's columns after the other, first its
own. Sums over rows (a column's log-sum-exp, a column's gradient) travel with the columns and are back at their
rank after one round. A rank holds the features of three ranks, so O(N / W) instead of O(N) for W ranks.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmssl.distributed import SINGLE_PROCESS, World
from mmssl.losses.blocks import (
    Blocks,
    Gradients,
    add_logsumexp_gradients,
    add_logsumexps,
    add_sigmoid_losses,
    block_shape,
)

Block = tuple[int, int]
"""Rows and columns held at a time."""


def logsumexps(
    left: Tensor,
    right: Tensor,
    scale: Tensor,
    offset: int = 0,
    without_diagonal: bool = False,
    block: Block | None = None,
    world: World = SINGLE_PROCESS,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp of each row [n] and each column [N] of scale * left @ right.T, and its diagonal [n].

    `left` is [n, D], `right` [N, D], `scale` a scalar. Row i's diagonal entry is in column offset + i;
    `without_diagonal` leaves it out of the sums. Differentiable once, in the three tensors. In a `world` of
    several ranks, the sums run over the columns of all ranks, and N is this rank's number of columns.
    """
    shape = block_shape(left.device) if block is None else block
    rows, columns, diagonal = _LogSumExps.apply(left, right, scale, offset, without_diagonal, shape, world)
    return rows, columns, diagonal


def sigmoid_loss(
    left: Tensor, right: Tensor, scale: Tensor, bias: Tensor, offset: int = 0, block: Block | None = None
) -> Tensor:
    """Sum over [n, N] of -log sigmoid(+-(scale * left @ right.T + bias)): + on the diagonal, - elsewhere.

    Arguments as in `logsumexps`. The forward pass finds the gradients while it has each block.
    """
    shape = block_shape(left.device) if block is None else block
    total: Tensor = _SigmoidLoss.apply(left, right, scale, bias, offset, shape, torch.is_grad_enabled())
    return total


def ring_sigmoid_loss(left: Tensor, right: Tensor, scale: Tensor, bias: Tensor, world: World) -> Tensor:
    """Sum over this rank's rows and all ranks' columns, as `sigmoid_loss`. Differentiable once."""
    total: Tensor = _RingSigmoidLoss.apply(left, right, scale, bias, world)
    return total


@torch.no_grad()
def nearest(left: Tensor, right: Tensor, world: World) -> Tensor:
    """The column of the greatest product with each row, int64 [n], counted from this rank's first column round the
    ring. Ranks may have different numbers of rows."""
    best = left.new_full((len(left),), -torch.inf)
    place = torch.zeros(len(left), dtype=torch.int64, device=left.device)
    start = 0
    for (columns,) in _visitors(world, right):
        most, index = (left @ columns.T).max(1)
        place = torch.where(most > best, index + start, place)
        best = torch.maximum(best, most)
        start += len(columns)
    return place


def _visitors(world: World, *columns: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Every rank's columns, this rank's own first; the next ones arrive while these are worked on."""
    for following in reversed(range(world.size)):
        arrival = world.ring_shift(*columns) if following else None
        yield columns
        if arrival is not None:
            columns = arrival()


class _LogSumExps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        left: Tensor,
        right: Tensor,
        scale: Tensor,
        offset: int,
        without_diagonal: bool,
        block: Block,
        world: World,
    ) -> tuple[Tensor, Tensor, Tensor]:
        row_lse = left.new_full((len(left),), -torch.inf)
        column_lse = right.new_full((len(right),), -torch.inf)
        diagonal = torch.empty_like(row_lse)
        for visit, (columns,) in enumerate(_visitors(world, right)):
            blocks = Blocks(left, columns, scale, _offset(visit, columns, offset), block)
            add_logsumexps(blocks, row_lse, column_lse, diagonal, without_diagonal)
            (column_lse,) = world.ring_shift(column_lse)()
        ctx.save_for_backward(left, right, scale, row_lse, column_lse)
        ctx.offset, ctx.without_diagonal, ctx.block, ctx.world = offset, without_diagonal, block, world
        return row_lse, column_lse, diagonal

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, row_gradient: Tensor, column_gradient: Tensor, diagonal_gradient: Tensor
    ) -> tuple[Tensor | None, ...]:
        left, right, scale, row_lse, column_lse = ctx.saved_tensors
        gradients = Gradients(left, right, scale, ctx.needs_input_grad)
        by_row = row_lse, row_gradient
        with torch.autocast(left.device.type, enabled=False):
            visitors = _visitors(ctx.world, right, column_lse, column_gradient)
            for visit, (columns, *by_column) in enumerate(visitors):
                blocks = Blocks(left, columns, scale, _offset(visit, columns, ctx.offset), ctx.block)
                by_column_pair = by_column[0], by_column[1]
                add_logsumexp_gradients(
                    blocks, by_row, by_column_pair, diagonal_gradient, ctx.without_diagonal, gradients
                )
                gradients.pass_on(ctx.world)
            return *gradients.finish(), None, None, None, None


class _SigmoidLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        left: Tensor,
        right: Tensor,
        scale: Tensor,
        bias: Tensor,
        offset: int,
        block: Block,
        with_gradients: bool,
    ) -> Tensor:
        blocks = Blocks(left, right, scale, offset, block)
        gradients = Gradients(left, right, scale, [with_gradients and need for need in ctx.needs_input_grad])
        loss, bias_gradient = add_sigmoid_losses(blocks, bias, gradients if with_gradients else None)
        ctx.save_for_backward(*gradients.finish(), bias_gradient)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (None if saved is None else gradient * saved for saved in ctx.saved_tensors)
        return *scaled, None, None, None


class _RingSigmoidLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, scale: Tensor, bias: Tensor, world: World) -> Tensor:
        total = left.new_zeros(())
        for visit, (columns,) in enumerate(_visitors(world, right)):
            blocks = Blocks(left, columns, scale, _offset(visit, columns), block_shape(left.device))
            total += add_sigmoid_losses(blocks, bias, None)[0]
        ctx.save_for_backward(left, right, scale, bias)
        ctx.world = world
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # The forward pass cannot find these: the gradient may differ between ranks, and columns visit them all.
        left, right, scale, bias = ctx.saved_tensors
        gradients = Gradients(left, right, scale, ctx.needs_input_grad)
        bias_gradient = torch.zeros_like(bias)
        with torch.autocast(left.device.type, enabled=False):
            for visit, (columns,) in enumerate(_visitors(ctx.world, right)):
                blocks = Blocks(left, columns, scale, _offset(visit, columns), block_shape(left.device))
                bias_gradient += add_sigmoid_losses(blocks, bias, gradients, gradient)[1]
                gradients.pass_on(ctx.world)
            return *gradients.finish(), bias_gradient, None


def _offset(visit: int, columns: Tensor, own: int = 0) -> int:
    """The column in which the diagonal begins: `own` among this rank's columns, beyond the edge of any others."""
    return own if visit == 0 else len(columns)
