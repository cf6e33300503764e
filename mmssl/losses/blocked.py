"""What losses need of the matrix of logits, without the matrix.

The losses look at scale * left @ right.T [n, N]. Here it exists one block at a time, in two buffers whose
size does not grow with the batch, and a backward pass computes blocks anew where it needs them: memory
O(n + N) in place of O(n N). In products of that size, InfoNCE takes 4 (1 forward, 1 anew and 2 for the
gradients backward) and SigLIP 3. Their plain forms take 3, but from some size on, moving the matrix costs
more than a product.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SMALLEST_EXPONENT = -60.0
"""Exponents are cut here. exp(-60) is below every sum's rounding, and what lies further down makes subnormal
numbers: a CPU multiplies them some 20 times slower, and for a confident model the matrix is full of them."""
LEFT_OUT = -1e30
"""Logit of what takes no part in a sum. Not -inf, whose difference with itself is not a number."""


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


def block_shape(device: torch.device) -> tuple[int, int]:
    """Rows and columns of a block: on a CPU what its caches hold, elsewhere what keeps the device busy."""
    return (1024, 2048) if device.type == "cpu" else (4096, 8192)


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


def add_logsumexps(
    blocks: "Blocks", row_lse: Tensor, column_lse: Tensor, diagonal: Tensor, without_diagonal: bool
) -> None:
    """Add a matrix to running log-sum-exps of rows and columns, and write its diagonal; all in place."""
    for rows in blocks.row_slices():
        for columns, logits, scratch in blocks.along(rows):
            crossed, values = blocks.diagonal(logits, rows, columns)
            diagonal[crossed] = values
            if without_diagonal:
                values.fill_(LEFT_OUT)
            by_column = _logsumexp(logits, 0, scratch)
            column_lse[columns] = torch.logaddexp(column_lse[columns], by_column)
            row_lse[rows] = torch.logaddexp(row_lse[rows], _logsumexp(logits, 1, logits))


def add_logsumexp_gradients(
    blocks: "Blocks",
    by_row: tuple[Tensor, Tensor],
    by_column: tuple[Tensor, Tensor],
    diagonal_gradient: Tensor,
    without_diagonal: bool,
    gradients: "Gradients",
) -> None:
    """Add what the log-sum-exps' gradients are to a matrix's two sides.

    `by_row` and `by_column`: the whole log-sum-exp of each row or column, and the gradient of it.
    """
    (row_lse, row_gradient), (column_lse, column_gradient) = by_row, by_column
    for rows in blocks.row_slices():
        for columns, logits, scratch in blocks.along(rows):
            torch.sub(logits, column_lse[columns], out=scratch)
            _exp_(scratch).mul_(column_gradient[columns])
            _exp_(logits.sub_(row_lse[rows, None])).mul_(row_gradient[rows, None]).add_(scratch)
            crossed, values = blocks.diagonal(logits, rows, columns)
            if without_diagonal:
                values.zero_()
            values.add_(diagonal_gradient[crossed])
            gradients.add(logits, rows, columns)


def add_sigmoid_losses(blocks: "Blocks", bias: Tensor, gradients: "Gradients | None") -> tuple[Tensor, Tensor]:
    """Sum of the sigmoid losses of a matrix, and its gradient for the bias (zero without `gradients`, which is given
    those for the two sides)."""
    losses, zero = blocks.left.new_zeros(len(blocks.left)), blocks.left.new_zeros(())
    of_bias = torch.zeros_like(losses)
    for rows in blocks.row_slices():
        for columns, logits, scratch in blocks.along(rows):
            # The loss of a pair is softplus(z), z = logit of a negative and -logit of a positive.
            _, positives = blocks.diagonal(logits.add_(bias), rows, columns)
            positives.neg_()
            losses[rows] += torch.logaddexp(logits, zero, out=scratch).sum(1)
            if gradients is not None:
                logits.clamp_(min=SMALLEST_EXPONENT).sigmoid_()
                positives.neg_()
                of_bias[rows] += logits.sum(1)
                gradients.add(logits, rows, columns)
    return losses.sum(), of_bias.sum()


class Blocks:
    """The blocks of an [n, N] matrix of logits, row by row, each computed into the same memory."""

    def __init__(self, left: Tensor, right: Tensor, scale: Tensor, offset: int, block: tuple[int, int]) -> None:
        self.left, self.right, self.scale, self.offset = left, right, scale, offset
        self.height, self.width = min(block[0], len(left)), min(block[1], len(right))
        self.memory = left.new_empty(2, self.height * self.width)

    def row_slices(self) -> Iterator[slice]:
        return _slices(len(self.left), self.height)

    def along(self, rows: slice) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Each block of these rows: its columns, its logits, and scratch of the same shape."""
        left = self.left[rows] * self.scale
        for columns in _slices(len(self.right), self.width):
            right = self.right[columns]
            shape = len(left), len(right)
            logits, scratch = (flat[: shape[0] * shape[1]].view(shape) for flat in self.memory)
            yield columns, torch.mm(left, right.T, out=logits), scratch

    def diagonal(self, block: Tensor, rows: slice, columns: slice) -> tuple[slice, Tensor]:
        """The rows in which the diagonal crosses this block, and a view of the block's values there."""
        first = self.offset + rows.start - columns.start
        values = block.diagonal(first)
        start = rows.start + max(0, -first)
        return slice(start, start + len(values)), values


class Gradients:
    """Gradients of left, right and scale, summed over blocks of the logits' gradient."""

    def __init__(self, left: Tensor, right: Tensor, scale: Tensor, needed: Sequence[bool]) -> None:
        self.inputs, self.needed = (left, right, scale), needed
        # The scale's gradient is read off one side's.
        self.left = torch.zeros_like(left) if needed[0] or (needed[2] and not needed[1]) else None
        self.right = torch.zeros_like(right) if needed[1] else None

    def add(self, block: Tensor, rows: slice, columns: slice) -> None:
        left, right, _ = self.inputs
        if self.left is not None:
            self.left[rows].addmm_(block, right[columns])
        if self.right is not None:
            self.right[columns].addmm_(block.T, left[rows])

    def finished(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Call once: until here the gradients lack the factor `scale`."""
        left, right, scale = self.inputs
        of_scale = None
        if self.needed[2]:
            summed, side = (self.right, right) if self.left is None else (self.left, left)
            of_scale = torch.einsum("nd,nd->n", summed, side).sum()
        for summed in (self.left, self.right):
            if summed is not None:
                summed.mul_(scale)
        return (self.left if self.needed[0] else None), self.right, of_scale


def _logsumexp(logits: Tensor, dim: int, scratch: Tensor) -> Tensor:
    """Over `dim`, with the exponentials written to `scratch`, which may be `logits` itself."""
    largest = logits.amax(dim, keepdim=True)
    exponentials = _exp_(torch.sub(logits, largest, out=scratch))
    return largest.squeeze(dim) + exponentials.sum(dim).log()


def _exp_(x: Tensor) -> Tensor:
    return x.clamp_(min=SMALLEST_EXPONENT).exp_()


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))
