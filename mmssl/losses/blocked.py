"""What InfoNCE and SigLIP need of the logits, without the matrix of logits.

Both losses look at scale * image @ text.T [n, N]. Here it exists one block at a time, in two buffers whose
size does not grow with the batch, and a backward pass computes blocks anew where it needs them: memory O(n + N)
in place of O(n N). Counted in products of that size, InfoNCE takes 4 (1 forward, 1 anew and 2 for the gradients
backward) and SigLIP 3. The plain forms take 3, but from some size on, moving the matrix costs more than that.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Form = Literal["auto", "plain", "blocked"]

_SMALLEST_EXPONENT = -60.0
"""Exponents are cut here. exp(-60) is below every sum's rounding, and what lies further down makes subnormal
numbers: a CPU multiplies them some 20 times slower, and for a confident model the matrix is full of them."""


def logsumexps(
    image: Tensor, text: Tensor, scale: Tensor, offset: int = 0, block: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp of each row [n] and each column [N] of scale * image @ text.T, and its positives [n].

    `image` is [n, D], `text` [N, D], `scale` a scalar; the positive of row i is in column offset + i.
    `block`: rows and columns held at a time. Differentiable once, in the three tensors.
    """
    shape = block_shape(image.device) if block is None else block
    rows, columns, positives = _LogSumExps.apply(image, text, scale, offset, shape)
    return rows, columns, positives


def sigmoid_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    offset: int = 0,
    block: tuple[int, int] | None = None,
) -> Tensor:
    """Sum over [n, N] of -log sigmoid(+-(scale * image @ text.T + bias)), + in column offset + i of row i.

    Arguments as in `logsumexps`. Gradients are found in the forward pass, where each block is at hand.
    """
    shape = block_shape(image.device) if block is None else block
    with_gradients = torch.is_grad_enabled()
    total: Tensor = _SigmoidLoss.apply(image, text, scale, bias, offset, shape, with_gradients)
    return total


def choose(form: Form, rows: int, columns: int, device: torch.device) -> Literal["plain", "blocked"]:
    """The form to use for a [rows, columns] matrix of logits: `form` itself, unless it is `auto`."""
    if form != "auto":
        return form
    # On a CPU the blocked form is the faster one from 4 Mi logits on. A GPU moves matrices fast: there it
    # starts where autograd's four or so copies of the matrix would take a GiB.
    largest_plain = 2**22 if device.type == "cpu" else 2**26
    return "plain" if rows * columns < largest_plain else "blocked"


def block_shape(device: torch.device) -> tuple[int, int]:
    """Rows and columns of a block: on a CPU what its caches hold, elsewhere what keeps the device busy."""
    return (1024, 2048) if device.type == "cpu" else (4096, 8192)


class _LogSumExps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, scale: Tensor, offset: int, block: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        row_lse = image.new_full((len(image),), -torch.inf)
        column_lse = image.new_full((len(text),), -torch.inf)
        positives = torch.empty_like(row_lse)
        blocks = _Blocks(image, text, scale, offset, block)
        for rows in blocks.row_slices():
            for columns, logits, scratch in blocks.along(rows):
                paired, values = blocks.positives(logits, rows, columns)
                positives[paired] = values
                by_column = _logsumexp(logits, 0, scratch)
                column_lse[columns] = torch.logaddexp(column_lse[columns], by_column)
                row_lse[rows] = torch.logaddexp(row_lse[rows], _logsumexp(logits, 1, logits))
        ctx.save_for_backward(image, text, scale, row_lse, column_lse)
        ctx.offset, ctx.block = offset, block
        return row_lse, column_lse, positives

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, row_gradient: Tensor, column_gradient: Tensor, positive_gradient: Tensor
    ) -> tuple[Tensor | None, ...]:
        image, text, scale, row_lse, column_lse = ctx.saved_tensors
        blocks = _Blocks(image, text, scale, ctx.offset, ctx.block)
        gradients = _Gradients(image, text, scale, ctx.needs_input_grad)
        with torch.autocast(image.device.type, enabled=False):
            for rows in blocks.row_slices():
                for columns, logits, scratch in blocks.along(rows):
                    torch.sub(logits, column_lse[columns], out=scratch)
                    _exp_(scratch).mul_(column_gradient[columns])
                    _exp_(logits.sub_(row_lse[rows, None])).mul_(row_gradient[rows, None]).add_(scratch)
                    paired, values = blocks.positives(logits, rows, columns)
                    values.add_(positive_gradient[paired])
                    gradients.add(logits, rows, columns)
            return *gradients.finished(), None, None


class _SigmoidLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        bias: Tensor,
        offset: int,
        block: tuple[int, int],
        with_gradients: bool,
    ) -> Tensor:
        losses, zero = image.new_zeros(len(image)), image.new_zeros(())
        bias_gradient = torch.zeros_like(losses)
        blocks = _Blocks(image, text, scale, offset, block)
        gradients = _Gradients(image, text, scale, [with_gradients and need for need in ctx.needs_input_grad])
        for rows in blocks.row_slices():
            for columns, logits, scratch in blocks.along(rows):
                # The loss of a pair is softplus(z), z = logit of a negative and -logit of a positive.
                _, positives = blocks.positives(logits.add_(bias), rows, columns)
                positives.neg_()
                losses[rows] += torch.logaddexp(logits, zero, out=scratch).sum(1)
                if with_gradients:
                    logits.clamp_(min=_SMALLEST_EXPONENT).sigmoid_()
                    positives.neg_()
                    bias_gradient[rows] += logits.sum(1)
                    gradients.add(logits, rows, columns)
        ctx.save_for_backward(*gradients.finished(), bias_gradient.sum())
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (None if saved is None else gradient * saved for saved in ctx.saved_tensors)
        return *scaled, None, None, None


class _Blocks:
    """The blocks of an [n, N] matrix of logits, row by row, each computed into the same memory."""

    def __init__(
        self, image: Tensor, text: Tensor, scale: Tensor, offset: int, block: tuple[int, int]
    ) -> None:
        self.image, self.text, self.scale, self.offset = image, text, scale, offset
        self.height, self.width = min(block[0], len(image)), min(block[1], len(text))
        self.memory = image.new_empty(2, self.height * self.width)

    def row_slices(self) -> Iterator[slice]:
        return _slices(len(self.image), self.height)

    def along(self, rows: slice) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Each block of these rows: its columns, its logits, and scratch of the same shape."""
        image = self.image[rows] * self.scale
        for columns in _slices(len(self.text), self.width):
            text = self.text[columns]
            shape = len(image), len(text)
            logits, scratch = (flat[: shape[0] * shape[1]].view(shape) for flat in self.memory)
            yield columns, torch.mm(image, text.T, out=logits), scratch

    def positives(self, block: Tensor, rows: slice, columns: slice) -> tuple[slice, Tensor]:
        """The rows whose positive lies in this block, and a view of the block's values there."""
        first = self.offset + rows.start - columns.start
        values = block.diagonal(first)
        start = rows.start + max(0, -first)
        return slice(start, start + len(values)), values


class _Gradients:
    """Gradients of image, text and scale, summed over blocks of the logits' gradient."""

    def __init__(self, image: Tensor, text: Tensor, scale: Tensor, needed: Sequence[bool]) -> None:
        self.inputs, self.needed = (image, text, scale), needed
        # The scale's gradient is read off the image's.
        self.image = torch.zeros_like(image) if needed[0] or needed[2] else None
        self.text = torch.zeros_like(text) if needed[1] else None

    def add(self, block: Tensor, rows: slice, columns: slice) -> None:
        image, text, _ = self.inputs
        if self.image is not None:
            self.image[rows].addmm_(block, text[columns])
        if self.text is not None:
            self.text[columns].addmm_(block.T, image[rows])

    def finished(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Call once: until here the gradients lack the factor `scale`."""
        image, _, scale = self.inputs
        of_scale = None
        if self.image is not None:
            of_scale = torch.einsum("nd,nd->n", self.image, image).sum() if self.needed[2] else None
            self.image.mul_(scale)
        if self.text is not None:
            self.text.mul_(scale)
        return (self.image if self.needed[0] else None), self.text, of_scale


def _logsumexp(logits: Tensor, dim: int, scratch: Tensor) -> Tensor:
    """Over `dim`, with the exponentials written to `scratch`, which may be `logits` itself."""
    largest = logits.amax(dim, keepdim=True)
    exponentials = _exp_(torch.sub(logits, largest, out=scratch))
    return largest.squeeze(dim) + exponentials.sum(dim).log()


def _exp_(x: Tensor) -> Tensor:
    return x.clamp_(min=_SMALLEST_EXPONENT).exp_()


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))
