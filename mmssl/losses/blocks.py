"""Sums over a matrix of logits scale * left @ right.T [n, N], and their gradients for the two sides.

The matrix exists one block at a time, in two buffers whose size does not grow with it.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from mmssl.distributed import World
from mmssl.losses.pairing import LEFT_OUT, Pairing

BlockForm = Literal["blocked", "triton"]
"""`triton` is the blocked form in kernels for GPUs, which multiply bfloat16."""
SMALLEST_EXPONENT = -60.0
"""Smaller exponents are set to this. exp(-60) is below the rounding of every sum, and much smaller ones make
subnormal numbers: a CPU multiplies them about 20 times slower, and a confident model's matrix is full of them."""


def block_shape(device: torch.device) -> tuple[int, int]:
    """Rows and columns of a block: small enough for the caches of a CPU, large enough to keep a GPU busy."""
    return (1024, 2048) if device.type == "cpu" else (4096, 8192)


class Blocks:
    """The blocks of an [n, N] matrix of logits, row by row, each computed into the same memory."""

    def __init__(self, left: Tensor, right: Tensor, scale: Tensor, block: tuple[int, int]) -> None:
        self.left, self.right, self.scale = left, right, scale
        self.height, self.width = min(block[0], len(left)), min(block[1], len(right))

    @cached_property
    def memory(self) -> Tensor:
        """Two buffers of the size of a block."""
        return self.left.new_empty(2, self.height * self.width)

    def row_slices(self) -> Iterator[slice]:
        """The rows of the blocks."""
        return _slices(len(self.left), self.height)

    def column_slices(self) -> Iterator[slice]:
        """The columns of the blocks."""
        return _slices(len(self.right), self.width)

    def along(self, rows: slice) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Each block of these rows: its columns, its logits, and scratch of the same shape."""
        left = self.left[rows] * self.scale
        for columns in self.column_slices():
            right = self.right[columns]
            shape = len(left), len(right)
            logits, scratch = (flat[: shape[0] * shape[1]].view(shape) for flat in self.memory)
            yield columns, torch.mm(left, right.T, out=logits), scratch

    def add_logsumexps(self, pairing: Pairing, row_lse: Tensor, column_lse: Tensor, positives: Tensor) -> None:
        """Add the matrix to log-sum-exps of rows and columns, and to its rows' sums of positives; all in place."""
        for rows in self.row_slices():
            for columns, logits, scratch in self.along(rows):
                pairing.read(logits, rows, columns, positives)
                by_column = _logsumexp(logits, 0, scratch)
                column_lse[columns] = torch.logaddexp(column_lse[columns], by_column)
                row_lse[rows] = torch.logaddexp(row_lse[rows], _logsumexp(logits, 1, logits))

    def add_logsumexp_gradients(
        self,
        pairing: Pairing,
        by_row: tuple[Tensor, Tensor],
        by_column: tuple[Tensor, Tensor],
        positive_gradient: Tensor,
        gradients: "Gradients",
    ) -> None:
        """Add the gradients of the log-sum-exps for the two sides to `gradients`.

        `by_row` and `by_column`: the complete log-sum-exp of each row or column, and its gradient.
        """
        (row_lse, row_gradient), (column_lse, column_gradient) = by_row, by_column
        for rows in self.row_slices():
            for columns, logits, scratch in self.along(rows):
                torch.sub(logits, column_lse[columns], out=scratch)
                _exp_(scratch).mul_(column_gradient[columns])
                _exp_(logits.sub_(row_lse[rows, None])).mul_(row_gradient[rows, None]).add_(scratch)
                pairing.add_gradient(logits, rows, columns, positive_gradient)
                gradients.add(self, logits, rows, columns)

    def add_sigmoid_losses(
        self, pairing: Pairing, bias: Tensor, gradients: "Gradients | None", factor: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Sum of the sigmoid losses of the matrix, and its gradient for the bias.

        Adds the gradients for the two sides to `gradients`; without it the gradient for the bias is zero. `factor`
        multiplies all gradients.
        """
        losses, zero = self.left.new_zeros(len(self.left)), self.left.new_zeros(())
        bias_gradient = torch.zeros_like(losses)
        for rows in self.row_slices():
            for columns, logits, scratch in self.along(rows):
                # The loss of a pair is softplus(z), z = logit of a negative and -logit of a positive.
                pairing.negate(logits.add_(bias), rows, columns, LEFT_OUT)
                losses[rows] += torch.logaddexp(logits, zero, out=scratch).sum(1)
                if gradients is not None:
                    logits.clamp_(min=SMALLEST_EXPONENT).sigmoid_()
                    pairing.negate(logits, rows, columns, 0)
                    if factor is not None:
                        logits.mul_(factor)
                    bias_gradient[rows] += logits.sum(1)
                    gradients.add(self, logits, rows, columns)
        return losses.sum(), bias_gradient.sum()

    def add_product(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        """Add a product of a block's gradient and the features of one side to rows of a sum."""
        total.addmm_(left, right)


class Gradients:
    """Gradients of left, right and scale, summed over blocks of the logits' gradient."""

    def __init__(self, left: Tensor, right: Tensor, scale: Tensor, needed: Sequence[bool]) -> None:
        self.inputs, self.needed = (left, right, scale), needed
        # The scale's gradient is computed from that of one side.
        self.left = torch.zeros_like(left) if needed[0] or (needed[2] and not needed[1]) else None
        self.right = torch.zeros_like(right) if needed[1] else None

    def add(self, blocks: Blocks, gradient: Tensor, rows: slice, columns: slice) -> None:
        """Add what the gradient of one block of logits contributes."""
        if self.left is not None:
            blocks.add_product(self.left[rows], gradient, blocks.right[columns])
        if self.right is not None:
            blocks.add_product(self.right[columns], gradient.T, blocks.left[rows])

    def pass_on(self, world: World) -> None:
        """Send the sum for the right side on round the ring, with its columns."""
        if self.right is not None:
            (self.right,) = world.ring_shift(self.right)()

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The three gradients. Call once: before, the sums lack the factor `scale`."""
        left, right, scale = self.inputs
        scale_gradient = None
        if self.needed[2]:
            summed, side = (self.right, right) if self.left is None else (self.left, left)
            scale_gradient = torch.einsum("nd,nd->n", summed, side).sum()
        for summed in (self.left, self.right):
            if summed is not None:
                summed.mul_(scale)
        return (self.left if self.needed[0] else None), self.right, scale_gradient


def _logsumexp(logits: Tensor, dim: int, scratch: Tensor) -> Tensor:
    """Log-sum-exp over `dim`; the exponentials are written to `scratch`, which may be `logits` itself."""
    largest = logits.amax(dim, keepdim=True)
    exponentials = _exp_(torch.sub(logits, largest, out=scratch))
    return largest.squeeze(dim) + exponentials.sum(dim).log()


def _exp_(x: Tensor) -> Tensor:
    return x.clamp_(min=SMALLEST_EXPONENT).exp_()


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))
