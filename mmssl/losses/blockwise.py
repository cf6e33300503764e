"""What losses need of the matrix of logits, without the matrix.

The losses look at scale * left @ right.T [n, N]. Here it exists one block at a time, in two buffers whose
size does not grow with the batch, and a backward pass computes blocks anew where it needs them: memory
O(n + N) in place of O(n N). In products of that size, InfoNCE takes 4 (1 forward, 1 anew and 2 for the
gradients backward) and SigLIP 3. Their plain forms take 3, but from some size on, moving the matrix costs
more than a product.
"""

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


def logsumexps(
    left: Tensor,
    right: Tensor,
    scale: Tensor,
    offset: int = 0,
    without_diagonal: bool = False,
    block: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp of each row [n] and each column [N] of scale * left @ right.T, and its diagonal [n].

    `left` is [n, D], `right` [N, D], `scale` a scalar. The diagonal has row i's entry in column offset + i;
    `without_diagonal` leaves it out of the sums. `block`: rows and columns held at a time. Differentiable
    once, in the three tensors.
    """
    shape = block_shape(left.device) if block is None else block
    rows, columns, diagonal = _LogSumExps.apply(left, right, scale, offset, without_diagonal, shape)
    return rows, columns, diagonal


def sigmoid_loss(
    left: Tensor,
    right: Tensor,
    scale: Tensor,
    bias: Tensor,
    offset: int = 0,
    block: tuple[int, int] | None = None,
) -> Tensor:
    """Sum over [n, N] of -log sigmoid(+-(scale * left @ right.T + bias)): + on the diagonal, - elsewhere.

    Arguments as in `logsumexps`. Gradients are found in the forward pass, where each block is at hand.
    """
    shape = block_shape(left.device) if block is None else block
    with_gradients = torch.is_grad_enabled()
    total: Tensor = _SigmoidLoss.apply(left, right, scale, bias, offset, shape, with_gradients)
    return total


class _LogSumExps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        left: Tensor,
        right: Tensor,
        scale: Tensor,
        offset: int,
        without_diagonal: bool,
        block: tuple[int, int],
    ) -> tuple[Tensor, Tensor, Tensor]:
        row_lse = left.new_full((len(left),), -torch.inf)
        column_lse = left.new_full((len(right),), -torch.inf)
        diagonal = torch.empty_like(row_lse)
        blocks = Blocks(left, right, scale, offset, block)
        add_logsumexps(blocks, row_lse, column_lse, diagonal, without_diagonal)
        ctx.save_for_backward(left, right, scale, row_lse, column_lse)
        ctx.offset, ctx.without_diagonal, ctx.block = offset, without_diagonal, block
        return row_lse, column_lse, diagonal

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, row_gradient: Tensor, column_gradient: Tensor, diagonal_gradient: Tensor
    ) -> tuple[Tensor | None, ...]:
        left, right, scale, row_lse, column_lse = ctx.saved_tensors
        blocks = Blocks(left, right, scale, ctx.offset, ctx.block)
        gradients = Gradients(left, right, scale, ctx.needs_input_grad)
        by_row, by_column = (row_lse, row_gradient), (column_lse, column_gradient)
        with torch.autocast(left.device.type, enabled=False):
            add_logsumexp_gradients(blocks, by_row, by_column, diagonal_gradient, ctx.without_diagonal, gradients)
            return *gradients.finished(), None, None, None


class _SigmoidLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        left: Tensor,
        right: Tensor,
        scale: Tensor,
        bias: Tensor,
        offset: int,
        block: tuple[int, int],
        with_gradients: bool,
    ) -> Tensor:
        blocks = Blocks(left, right, scale, offset, block)
        gradients = Gradients(left, right, scale, [with_gradients and need for need in ctx.needs_input_grad])
        loss, of_bias = add_sigmoid_losses(blocks, bias, gradients if with_gradients else None)
        ctx.save_for_backward(*gradients.finished(), of_bias)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (None if saved is None else gradient * saved for saved in ctx.saved_tensors)
        return *scaled, None, None, None
