"""Sums over a matrix of logits scale * left @ right.T [n, N] that exists one block at a time, in two buffers whose size
does not grow with it, and their gradients for the two sides."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

SMALLEST_EXPONENT = -60.0
"""Exponents are cut here. exp(-60) is below every sum's rounding, and what lies further down makes subnormal
numbers: a CPU multiplies them some 20 times slower, and for a confident model the matrix is full of them."""
LEFT_OUT = -1e30
"""Logit of what takes no part in a sum. Not -inf, whose difference with itself is not a number."""


def block_shape(device: torch.device) -> tuple[int, int]:
    """Rows and columns of a block: on a CPU what its caches hold, elsewhere what keeps the device busy."""
    return (1024, 2048) if device.type == "cpu" else (4096, 8192)


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
