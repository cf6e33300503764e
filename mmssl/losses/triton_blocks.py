# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""The blocks of `mmssl.losses.blocks` in Triton kernels: products of bfloat16, sums in float32.

A kernel computes a tile of logits and reduces it, or makes its gradient, before it leaves the processor: float32 logits
are never written. The gradient of a block is written as bfloat16 and multiplied by the features of the other side.
The backward pass uses the log-sum-exps of the forward pass again, so InfoNCE takes four products and SigLIP three.

Import this module only where it is used: Triton comes with torch's builds for GPUs.
"""

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmssl.errors import UserError
from mmssl.losses.blocks import Blocks, Gradients
from mmssl.losses.pairing import LEFT_OUT, Diagonal, Pairing

ROWS, COLUMNS, DEPTH = tl.constexpr(128), tl.constexpr(128), tl.constexpr(64)
"""A tile, and the part of the features that is multiplied at a time."""
GROUP = tl.constexpr(8)
"""Rows of tiles that are worked on together, so that the features they share stay in the cache."""
_HIDDEN = tl.constexpr(LEFT_OUT)
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""Triton's interpreter runs kernels on a CPU, for tests. It multiplies no bfloat16; as float32 the products are the
same."""


class TritonBlocks(Blocks):
    """Blocks of logits with the positives on a diagonal, on a GPU that multiplies bfloat16."""

    def __init__(self, left: Tensor, right: Tensor, scale: Tensor, block: tuple[int, int]) -> None:
        """
        Raises:
            UserError: the device cannot run the kernels.
        """
        _check_device(left.device)
        super().__init__(left.bfloat16().contiguous(), right.bfloat16().contiguous(), scale.float(), block)

    def add_logsumexps(self, pairing: Pairing, row_lse: Tensor, column_lse: Tensor, positives: Tensor) -> None:
        """As `Blocks`."""
        diagonal = _diagonal(pairing)
        n, depth = self.right.shape
        for rows in self.row_slices():
            left, found = self.left[rows], positives[rows]
            by_row = row_lse.new_empty(triton.cdiv(n, COLUMNS.value), len(left))
            by_column = row_lse.new_empty(triton.cdiv(len(left), ROWS.value), n)
            sums = (by_row, by_column, found)
            shape = len(left), n, depth, diagonal.offset + rows.start
            _launch(_logsumexps, left, n, (left, self.right, self.scale, *sums, *shape, diagonal.left_out))
            row_lse[rows] = torch.logaddexp(row_lse[rows], by_row.logsumexp(0))
            column_lse.copy_(torch.logaddexp(column_lse, by_column.logsumexp(0)))

    def add_logsumexp_gradients(
        self,
        pairing: Pairing,
        by_row: tuple[Tensor, Tensor],
        by_column: tuple[Tensor, Tensor],
        positive_gradient: Tensor,
        gradients: Gradients,
    ) -> None:
        """As `Blocks`."""
        diagonal = _diagonal(pairing)
        of_rows = [x.contiguous() for x in (*by_row, positive_gradient)]
        of_columns = [x.contiguous() for x in by_column]
        for rows in self.row_slices():
            for columns in self.column_slices():
                left, right, out = self._block(rows, columns)
                sums = *(x[rows] for x in of_rows), *(x[columns] for x in of_columns)
                shape = *out.shape, left.shape[1], diagonal.offset + rows.start - columns.start
                given = (left, right, self.scale, *sums, out, *shape, diagonal.left_out)
                _launch(_logsumexp_gradients, left, len(right), given)
                gradients.add(self, out, rows, columns)

    def add_sigmoid_losses(
        self, pairing: Pairing, bias: Tensor, gradients: Gradients | None, factor: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `Blocks`."""
        diagonal = _diagonal(pairing)
        factor = torch.ones_like(self.scale) if factor is None else factor.float()
        totals = torch.zeros(2, device=self.left.device)
        for rows in self.row_slices():
            for columns in self.column_slices():
                left, right, out = self._block(rows, columns)
                parts = totals.new_empty(2, _tiles(len(left), len(right)))
                shape = *out.shape, left.shape[1], diagonal.offset + rows.start - columns.start
                given = (left, right, self.scale, bias.float(), factor, *parts, out, *shape, gradients is not None)
                _launch(_sigmoid_losses, left, len(right), given)
                totals += parts.sum(1)
                if gradients is not None:
                    gradients.add(self, out, rows, columns)
        return totals[0], totals[1] if gradients is not None else torch.zeros_like(totals[1])

    def add_product(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        """As `Blocks`."""
        shape = len(left), right.shape[1], len(right)
        strides = *left.stride(), *right.stride(), *total.stride()
        _launch(_add_product, left, right.shape[1], (total, left, right, *shape, *strides))

    def _block(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor, Tensor]:
        """The features of a block, and memory for its gradient."""
        left, right = self.left[rows], self.right[columns]
        return left, right, left.new_empty(len(left), len(right))


def _check_device(device: torch.device) -> None:
    """Refuse a device without Triton or without products of bfloat16.

    Raises:
        UserError: says which it is.
    """
    if _INTERPRETED.value:
        return
    if device.type != "cuda":
        raise UserError(f"form=triton: the loss is on {device.type}, and its kernels are for GPUs; leave form at auto")
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        raise UserError("form=triton: this GPU does not multiply bfloat16; leave form at auto")


def _diagonal(pairing: Pairing) -> Diagonal:
    assert isinstance(pairing, Diagonal), "the kernels know one positive per row"
    return pairing


def _tiles(rows: int, columns: int) -> int:
    count: int = triton.cdiv(rows, ROWS.value) * triton.cdiv(columns, COLUMNS.value)
    return count


def _launch(kernel: Any, left: Tensor, columns: int, arguments: tuple[object, ...]) -> None:
    """Run a kernel for every tile of len(left) rows and `columns` columns."""
    with torch.cuda.device_of(left):
        kernel[(_tiles(len(left), columns),)](*arguments, num_warps=8, num_stages=3, enable_fp_fusion=True)


@triton.jit
def _product(left, right, M, N, K, LEFT_ROW, LEFT_COLUMN, RIGHT_ROW, RIGHT_COLUMN):
    """This program's tile of left [M, K] @ right [K, N], given with their strides: its place among the tiles, its row
    and column numbers and its values. The order of the tiles is that of Triton's tutorial on matrix products."""
    program = tl.program_id(0)
    in_group = GROUP * tl.cdiv(N, COLUMNS)
    first = program // in_group * GROUP
    height = tl.minimum(tl.cdiv(M, ROWS) - first, GROUP)
    tile_row = first + program % in_group % height
    tile_column = program % in_group // height
    rows = tile_row * ROWS + tl.arange(0, ROWS)
    columns = tile_column * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    # Beyond the edges any values will do, because the caller leaves them out.
    left += (rows % M).to(tl.int64)[:, None] * LEFT_ROW + depth[None, :] * LEFT_COLUMN
    right += (columns % N).to(tl.int64)[None, :] * RIGHT_COLUMN + depth[:, None] * RIGHT_ROW
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, K, DEPTH):
        a = tl.load(left, mask=depth[None, :] < K - start, other=0.0)
        b = tl.load(right, mask=depth[:, None] < K - start, other=0.0)
        if _INTERPRETED:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total)
        left += DEPTH * LEFT_COLUMN
        right += DEPTH * RIGHT_ROW
    return tile_row, tile_column, rows, columns, total


@triton.jit
def _logsumexps(left, right, scale, by_row, by_column, positives, M, N, D, diagonal, LEFT_OUT: tl.constexpr):
    """The log-sum-exps of a tile's rows and columns, into by_row [tiles, M] and by_column [tiles, N]."""
    tile_row, tile_column, rows, columns, logits = _product(left, right, M, N, D, D, 1, 1, D)
    logits *= tl.load(scale)
    own = rows[:, None] + diagonal == columns[None, :]
    crossed = (rows + diagonal) // COLUMNS == tile_column
    found = tl.sum(tl.where(own, logits, 0.0), 1)
    tl.store(positives + rows, found, mask=(rows < M) & crossed & (rows + diagonal < N))
    hidden = (rows >= M)[:, None] | (columns >= N)[None, :]
    if LEFT_OUT:
        hidden = hidden | own
    logits = tl.where(hidden, _HIDDEN, logits)
    largest = tl.max(logits, 1)
    lse = largest + tl.log(tl.sum(tl.exp(logits - largest[:, None]), 1))
    tl.store(by_row + tile_column * M + rows, lse, mask=rows < M)
    largest = tl.max(logits, 0)
    lse = largest + tl.log(tl.sum(tl.exp(logits - largest[None, :]), 0))
    tl.store(by_column + tile_row * N + columns, lse, mask=columns < N)


@triton.jit
def _logsumexp_gradients(
    left,
    right,
    scale,
    row_lse,
    row_gradient,
    positive_gradient,
    column_lse,
    column_gradient,
    out,
    M,
    N,
    D,
    diagonal,
    LEFT_OUT: tl.constexpr,
):
    """The gradient of a tile's logits, into out [M, N]."""
    _, _, rows, columns, logits = _product(left, right, M, N, D, D, 1, 1, D)
    logits *= tl.load(scale)
    inside_rows, inside_columns = rows < M, columns < N
    by_row = tl.exp(logits - tl.load(row_lse + rows, inside_rows, 0.0)[:, None])
    by_column = tl.exp(logits - tl.load(column_lse + columns, inside_columns, 0.0)[None, :])
    gradient = by_row * tl.load(row_gradient + rows, inside_rows, 0.0)[:, None]
    gradient += by_column * tl.load(column_gradient + columns, inside_columns, 0.0)[None, :]
    own = rows[:, None] + diagonal == columns[None, :]
    if LEFT_OUT:
        gradient = tl.where(own, 0.0, gradient)
    gradient += tl.where(own, tl.load(positive_gradient + rows, inside_rows, 0.0)[:, None], 0.0)
    inside = inside_rows[:, None] & inside_columns[None, :]
    tl.store(out + rows[:, None] * N + columns[None, :], gradient.to(tl.bfloat16), mask=inside)


@triton.jit
def _sigmoid_losses(
    left, right, scale, bias, factor, losses, bias_gradients, out, M, N, D, diagonal, GRADIENT: tl.constexpr
):
    """The sum of a tile's losses and, with GRADIENT, its gradient, into out [M, N], and that gradient's sum."""
    _, _, rows, columns, logits = _product(left, right, M, N, D, D, 1, 1, D)
    logits = logits * tl.load(scale) + tl.load(bias)
    own = rows[:, None] + diagonal == columns[None, :]
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    logits = tl.where(inside, tl.where(own, -logits, logits), _HIDDEN)
    # softplus(z) = max(z, 0) + log(1 + x). Nearly all x are tiny, and 1 + x would lose them, so the logarithm is
    # 2 artanh(x / (2 + x)) by its series: y is at most 1/3, and the first term left out below 2e-7 of the sum.
    x = tl.exp(-tl.abs(logits))
    y = x / (2 + x)
    z = y * y
    series = 1 + z * (1 / 3 + z * (1 / 5 + z * (1 / 7 + z * (1 / 9 + z / 11))))
    loss = tl.maximum(logits, 0.0) + 2 * y * series
    program = tl.program_id(0)
    tl.store(losses + program, tl.sum(loss))
    if GRADIENT:
        gradient = tl.where(logits >= 0, 1.0, x) / (1 + x)
        gradient = tl.where(own, -gradient, gradient) * tl.load(factor)
        tl.store(bias_gradients + program, tl.sum(gradient))
        tl.store(out + rows[:, None] * N + columns[None, :], gradient.to(tl.bfloat16), mask=inside)


@triton.jit
def _add_product(total, left, right, M, N, K, LEFT_ROW, LEFT_COLUMN, RIGHT_ROW, RIGHT_COLUMN, ROW, COLUMN):
    """Add a tile of left @ right to that of total [M, N]."""
    _, _, rows, columns, product = _product(left, right, M, N, K, LEFT_ROW, LEFT_COLUMN, RIGHT_ROW, RIGHT_COLUMN)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    places = total + rows[:, None] * ROW + columns[None, :] * COLUMN
    tl.store(places, tl.load(places, inside, 0.0) + product, mask=inside)
