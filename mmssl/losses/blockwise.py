"""Sums over a matrix of logits in blocks, with the columns of one process or of each rank in turn.

A backward pass computes blocks anew, so memory is O(n + N) instead of O(n N). InfoNCE takes four products of
the matrix's size (one forward, one anew and two for the gradients backward) and SigLIP three; the plain forms
take three, but from some size on moving the matrix costs more than a product.

Over a ring (`world.ring`), each rank keeps its rows and receives one rank's columns after the other, first its
own. Sums over rows (a column's log-sum-exp, a column's gradient) travel with the columns and are back at their
rank after one round. A rank holds the features of three ranks, so O(N / W) instead of O(N) for W ranks.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmssl.distributed import SINGLE_PROCESS, World
from mmssl.errors import UserError
from mmssl.losses.blocks import BlockForm, Blocks, Gradients, block_shape
from mmssl.losses.pairing import Pairing

Block = tuple[int, int]
"""Rows and columns held at a time."""
MakeBlocks = Callable[[Tensor, Tensor, Tensor], Blocks]
"""From left, right and scale to the blocks of their matrix."""


def logsumexps(
    left: Tensor,
    right: Tensor,
    scale: Tensor,
    pairing: Pairing,
    *,
    block: Block | None = None,
    form: BlockForm = "blocked",
    world: World = SINGLE_PROCESS,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp of each row [n] and each column [N] of scale * left @ right.T, and each row's sum of positives [n].

    `left` is [n, D], `right` [N, D], `scale` a scalar. Differentiable once, in the three tensors. In a `world` of
    several ranks, the sums run over the columns of all ranks, and N is this rank's number of columns.
    """
    make = _blocks(left.device, block, form)
    rows, columns, positives = _LogSumExps.apply(left, right, scale, pairing, make, world)
    return rows, columns, positives


def sigmoid_loss(
    left: Tensor,
    right: Tensor,
    scale: Tensor,
    bias: Tensor,
    pairing: Pairing,
    *,
    block: Block | None = None,
    form: BlockForm = "blocked",
) -> Tensor:
    """Sum over [n, N] of -log sigmoid(+-(scale * left @ right.T + bias)): + for positives, - elsewhere.

    Arguments as in `logsumexps`. The forward pass finds the gradients while it has each block.
    """
    make = _blocks(left.device, block, form)
    total: Tensor = _SigmoidLoss.apply(left, right, scale, bias, pairing, make, torch.is_grad_enabled())
    return total


def ring_sigmoid_loss(
    left: Tensor,
    right: Tensor,
    scale: Tensor,
    bias: Tensor,
    pairing: Pairing,
    *,
    form: BlockForm = "blocked",
    world: World,
) -> Tensor:
    """Sum over this rank's rows and all ranks' columns, as `sigmoid_loss`. Differentiable once."""
    make = _blocks(left.device, None, form)
    total: Tensor = _RingSigmoidLoss.apply(left, right, scale, bias, pairing, make, world)
    return total


@torch.no_grad()
def nearest(left: Tensor, right: Tensor, world: World, labels: Tensor | None = None) -> Tensor:
    """The label of the column with the greatest product with each row, int64 [n].

    `labels` are those of `right`; by default columns are counted from this rank's first one round the ring. Ranks may
    have different numbers of rows.
    """
    best = left.new_full((len(left),), -torch.inf)
    found = torch.zeros(len(left), dtype=torch.int64, device=left.device)
    start = 0
    for columns, *own in _visitors(world, right, *([] if labels is None else [labels])):
        most, index = (left @ columns.T).max(1)
        found = torch.where(most > best, own[0][index] if own else index + start, found)
        best = torch.maximum(best, most)
        start += len(columns)
    return found


def _blocks(device: torch.device, block: Block | None, form: BlockForm) -> MakeBlocks:
    shape = block_shape(device) if block is None else block
    if form == "blocked":
        return partial(Blocks, block=shape)
    try:
        from mmssl.losses.triton_blocks import TritonBlocks
    except ModuleNotFoundError:
        raise UserError("form=triton needs Triton, which comes with PyTorch for GPUs; leave form at auto") from None
    return partial(TritonBlocks, block=shape)


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
        ctx: Any, left: Tensor, right: Tensor, scale: Tensor, pairing: Pairing, make: MakeBlocks, world: World
    ) -> tuple[Tensor, Tensor, Tensor]:
        row_lse = left.new_full((len(left),), -torch.inf)
        column_lse = right.new_full((len(right),), -torch.inf)
        positives = torch.zeros_like(row_lse)
        for visit, (columns, *groups) in enumerate(_visitors(world, right, *pairing.columns)):
            here = pairing.visiting(visit, len(columns), groups)
            make(left, columns, scale).add_logsumexps(here, row_lse, column_lse, positives)
            (column_lse,) = world.ring_shift(column_lse)()
        ctx.save_for_backward(left, right, scale, row_lse, column_lse)
        ctx.pairing, ctx.make, ctx.world = pairing, make, world
        return row_lse, column_lse, positives

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, row_gradient: Tensor, column_gradient: Tensor, positive_gradient: Tensor
    ) -> tuple[Tensor | None, ...]:
        left, right, scale, row_lse, column_lse = ctx.saved_tensors
        gradients = Gradients(left, right, scale, ctx.needs_input_grad)
        by_row = row_lse, row_gradient
        with torch.autocast(left.device.type, enabled=False):
            visitors = _visitors(ctx.world, right, column_lse, column_gradient, *ctx.pairing.columns)
            for visit, (columns, lse, gradient, *groups) in enumerate(visitors):
                here = ctx.pairing.visiting(visit, len(columns), groups)
                blocks = ctx.make(left, columns, scale)
                blocks.add_logsumexp_gradients(here, by_row, (lse, gradient), positive_gradient, gradients)
                gradients.pass_on(ctx.world)
            return *gradients.finish(), None, None, None


class _SigmoidLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        left: Tensor,
        right: Tensor,
        scale: Tensor,
        bias: Tensor,
        pairing: Pairing,
        make: MakeBlocks,
        with_gradients: bool,
    ) -> Tensor:
        blocks = make(left, right, scale)
        gradients = Gradients(left, right, scale, [with_gradients and need for need in ctx.needs_input_grad])
        loss, bias_gradient = blocks.add_sigmoid_losses(pairing, bias, gradients if with_gradients else None)
        ctx.save_for_backward(*gradients.finish(), bias_gradient)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (None if saved is None else gradient * saved for saved in ctx.saved_tensors)
        return *scaled, None, None, None


class _RingSigmoidLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        left: Tensor,
        right: Tensor,
        scale: Tensor,
        bias: Tensor,
        pairing: Pairing,
        make: MakeBlocks,
        world: World,
    ) -> Tensor:
        total = left.new_zeros(())
        for visit, (columns, *groups) in enumerate(_visitors(world, right, *pairing.columns)):
            here = pairing.visiting(visit, len(columns), groups)
            total += make(left, columns, scale).add_sigmoid_losses(here, bias, None)[0]
        ctx.save_for_backward(left, right, scale, bias)
        ctx.pairing, ctx.make, ctx.world = pairing, make, world
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # The forward pass cannot find these: the gradient may differ between ranks, and columns visit them all.
        left, right, scale, bias = ctx.saved_tensors
        gradients = Gradients(left, right, scale, ctx.needs_input_grad)
        bias_gradient = torch.zeros_like(bias)
        with torch.autocast(left.device.type, enabled=False):
            for visit, (columns, *groups) in enumerate(_visitors(ctx.world, right, *ctx.pairing.columns)):
                here = ctx.pairing.visiting(visit, len(columns), groups)
                blocks = ctx.make(left, columns, scale)
                bias_gradient += blocks.add_sigmoid_losses(here, bias, gradients, gradient)[1]
                gradients.pass_on(ctx.world)
            return *gradients.finish(), bias_gradient, None, None, None
