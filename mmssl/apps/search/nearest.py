"""Nearest embeddings in plain arrays: exact search, or a graph for large sets."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mmssl.errors import UserError
from mmssl.files import atomic_write
from mmssl.inference import stored

Embeddings = npt.NDArray[np.float16] | npt.NDArray[np.float32] | npt.NDArray[np.int8]
"""[N, D]. Of int8 rows only the direction counts: they stand for unit vectors."""
Rows = npt.NDArray[np.int64]
Matches = tuple[Rows, npt.NDArray[np.float32]]
"""Row numbers and inner products, each [Q, k], the highest first."""

BLOCK = 1024
"""Rows converted to float32 and compared at once; they stay in a core's cache."""
CHOSEN = 1 << 16
"""Rows of a part that are copied at once when only some are compared."""
EXPANSION = 128
"""Candidates that the graph keeps during a search; more find more of the true neighbours and take longer."""
COMPARED, LEAST_COMPARED = 4, 64
"""Candidates per requested row that the graph proposes, and their least number. The stored embeddings rank them."""


def exact_nearest(queries: Embeddings, parts: Iterable[Embeddings], k: int, unit: bool = False) -> Matches:
    """The k rows of all parts with the highest inner product with each query.

    Args:
        queries: [Q, D].
        parts: [N, D] each, for example memory-mapped files; row numbers run on from part to part.
        unit: the rows have at most unit length, as in an index. A single query is then compared with float16 rows in
            half precision first, and in single precision with the rows that come close: this takes less than half
            the time and gives the same result.
    """
    wanted = torch.from_numpy(np.asarray(queries, dtype=np.float32))
    scores = torch.empty(len(wanted), 0)
    rows = torch.empty(len(wanted), 0, dtype=torch.int64)
    start = 0
    for part in parts:
        if unit and len(wanted) == 1 and part.dtype == np.float16 and part.flags.writeable and len(part) > k:
            found, products = _near(wanted[0], part, k)
        else:
            found, products = torch.arange(len(part)).expand(len(wanted), -1), _products(wanted, part)
        # The best of the part are chosen first: joining all products with those before would copy them once more.
        products, best = products.topk(min(k, products.shape[1]), dim=1)
        scores, rows = torch.cat([scores, products], 1), torch.cat([rows, start + found.gather(1, best)], 1)
        scores, best = scores.topk(min(k, scores.shape[1]), dim=1)
        rows = rows.gather(1, best)
        start += len(part)
    return rows.numpy(), scores.numpy()


def _products(wanted: Tensor, part: Embeddings) -> Tensor:
    """Inner products of queries [Q, D] and rows [N, D], float32 [Q, N]."""
    products = torch.empty(len(wanted), len(part))
    for first in range(0, len(part), BLOCK):
        # Copied, since memory maps are read-only; torch converts float16 in half of NumPy's time.
        block = torch.from_numpy(np.array(part[first : first + BLOCK])).float()
        block = nn.functional.normalize(block) if part.dtype == np.int8 else block
        torch.mm(wanted, block.T, out=products[:, first : first + len(block)])
    return products


def _near(wanted: Tensor, part: Embeddings, k: int) -> tuple[Tensor, Tensor]:
    """Rows of a part [N, D] that certainly include the k nearest to a query [D], and their products, [1, n] each.

    torch multiplies in half precision and sums in single, over all threads. The error of a product is bounded by the
    rounding of the query, of the product (2^-11 of the largest possible one) and of the sum.
    """
    values, half = torch.from_numpy(part), wanted.half()
    rough = torch.mv(values, half).float()
    length = float(wanted.norm())
    error = 1.001 * (float((wanted - half.float()).norm()) + (2**-11 + len(wanted) * 2**-24) * length)
    least = rough.topk(k).values[-1] - 2 * error
    rows = (rough >= least).nonzero()[:, 0]
    return rows[None], (values[rows].float() @ wanted)[None]


class Graph:
    """A navigable small-world graph (Malkov and Yashunin 2018), built by usearch on embeddings rounded to 8 bits.

    The graph proposes rows, and the stored embeddings rank them. It has half the size and twice the speed of a graph in
    half precision. Without the second ranking it would miss about 5 % of the neighbours.
    """

    def __init__(self, index: Any, parts: Sequence[Embeddings]) -> None:
        """Call `open` instead; `parts` are the embeddings [N, D] of the graph's rows."""
        self._index = index
        self._parts = parts
        self._starts = part_starts(parts)

    @classmethod
    def build(cls, parts: Sequence[Embeddings], dim: int, path: Path) -> "Graph":
        """Build the graph of all rows, which have unit length, and write it.

        Raises:
            UserError: usearch is not installed.
        """
        index = _usearch().Index(ndim=dim, metric="ip", dtype="i8")
        start = 0
        for part in parts:
            for first in range(0, len(part), BLOCK):
                block = stored.as_unit(part[first : first + BLOCK]).astype(np.float16)
                index.add(np.arange(start + first, start + first + len(block)), block)
            start += len(part)
        atomic_write(path, lambda partial: index.save(str(partial)))
        return cls.open(path, parts)

    @classmethod
    def open(cls, path: Path, parts: Sequence[Embeddings]) -> "Graph":
        """Memory-map a graph.

        Raises:
            UserError: usearch is not installed, or the file is not a graph of these embeddings.
        """
        library = _usearch()
        try:
            graph = cls(library.Index.restore(str(path), view=True), parts)
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(f"{path} is not a graph of usearch: {' '.join(str(error).split())}; embed again") from None
        graph._index.expansion_search = EXPANSION  # not stored in the file
        if len(graph._index) != graph._starts[-1]:
            raise UserError(
                f"{path} is the graph of {len(graph._index):,} embeddings, not of these {graph._starts[-1]:,}; "
                f"remove it, and embed again with --graph"
            )
        return graph

    def nearest(self, queries: Embeddings, k: int) -> Matches:
        """Approximately the k rows with the highest inner product with each query [Q, D], and the products."""
        wanted = np.atleast_2d(np.asarray(queries, dtype=np.float32))
        count = min(len(self._index), max(COMPARED * k, LEAST_COMPARED))
        found = [self._index.search(query, count).keys for query in wanted]
        proposed = np.stack([rows[: min(map(len, found))] for rows in found]).astype(np.int64)
        products = np.einsum("qcd,qd->qc", self._embeddings(proposed), wanted)
        best = np.argsort(-products, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(proposed, best, axis=1), np.take_along_axis(products, best, axis=1)

    def _embeddings(self, rows: Rows) -> npt.NDArray[np.float32]:
        """Stored embeddings of rows [...], float32 [..., D]."""
        numbers, places = locate(self._starts, rows)
        embeddings = np.empty((*rows.shape, self._parts[0].shape[1]), dtype=np.float32)
        for number in np.unique(numbers).tolist():
            here = numbers == number
            embeddings[here] = stored.as_unit(self._parts[number][places[here]])
        return embeddings


def chosen_rows(parts: Sequence[Embeddings], rows: Rows) -> Iterator[Embeddings]:
    """The rows of these numbers (ascending) of all parts, a few at a time."""
    starts = part_starts(parts)
    bounds = np.searchsorted(rows, starts).tolist()
    for part, start, first, stop in zip(parts, starts.tolist(), bounds, bounds[1:], strict=False):
        if stop - first == len(part):
            yield part
            continue
        for place in range(first, stop, CHOSEN):
            yield part[rows[place : min(place + CHOSEN, stop)] - start]


def prefix(part: Embeddings, dim: int) -> npt.NDArray[np.float16]:
    """The first dimensions of each row, scaled to unit length, float16 [N, dim]."""
    found = np.empty((len(part), dim), dtype=np.float16)
    for first in range(0, len(part), BLOCK):
        block = stored.as_unit(part[first : first + BLOCK])[:, :dim]
        found[first : first + BLOCK] = block / np.maximum(np.linalg.norm(block, axis=1, keepdims=True), 1e-30)
    return found


def part_starts(parts: Iterable[Embeddings]) -> Rows:
    """The number of each part's first row, followed by the number of rows in total."""
    return np.cumsum([0, *(len(part) for part in parts)])


def locate(starts: Rows, rows: Rows) -> tuple[Rows, Rows]:
    """The part that holds each row, and the row's place in it; `starts` from `part_starts`."""
    numbers = np.searchsorted(starts, rows, side="right") - 1
    return numbers, rows - starts[numbers]


def _usearch() -> Any:
    try:
        import usearch.index
    except ImportError:
        raise UserError("searching large sets needs usearch: pip install 'mmssl[search]'; or search exactly") from None
    return usearch.index
