"""Nearest vectors, on plain arrays: exactly, or by a graph for large sets."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mmssl.types import UserError

Vectors = npt.NDArray[np.float16] | npt.NDArray[np.float32]
Found = tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]
"""Row numbers and inner products, each [Q, k], the highest first."""

BLOCK = 16_384
"""Rows that are compared at once."""
EXPANSION = 128
"""Candidates that the graph keeps while it searches; more find more of the true neighbours and take longer."""


def exact_nearest(queries: Vectors, parts: Iterable[Vectors], k: int) -> Found:
    """The k rows of all parts together with the highest inner product with each query.

    Args:
        queries: [Q, D].
        parts: [N, D] each, for example memory-mapped files; rows are numbered through them.
    """
    wanted = torch.from_numpy(np.asarray(queries, dtype=np.float32)).T
    scores = torch.empty(wanted.shape[1], 0)
    rows = torch.empty(wanted.shape[1], 0, dtype=torch.int64)
    start = 0
    for part in parts:
        for first in range(0, len(part), BLOCK):
            # A copy, since maps cannot be written; torch widens half precision in half of NumPy's time.
            block = torch.from_numpy(np.array(part[first : first + BLOCK])).float()
            numbers = torch.arange(start + first, start + first + len(block)).expand(len(scores), -1)
            scores, rows = torch.cat([scores, (block @ wanted).T], 1), torch.cat([rows, numbers], 1)
            scores, best = scores.topk(min(k, scores.shape[1]), dim=1)
            rows = rows.gather(1, best)
        start += len(part)
    return rows.numpy(), scores.numpy()


class Graph:
    """A navigable small-world graph (Malkov and Yashunin 2018), as usearch builds it."""

    def __init__(self, index: Any) -> None:
        self._index = index

    @classmethod
    def build(cls, parts: Iterable[Vectors], dim: int, path: Path) -> "Graph":
        """Build the graph of all rows and write it.

        Raises:
            UserError: usearch is missing.
        """
        index = _usearch().Index(ndim=dim, metric="ip", dtype="f16", expansion_search=EXPANSION)
        start = 0
        for part in parts:
            for first in range(0, len(part), BLOCK):
                block = np.asarray(part[first : first + BLOCK], dtype=np.float16)
                index.add(np.arange(start + first, start + first + len(block)), block)
            start += len(part)
        partial = path.with_name(f".{path.name}.partial")
        index.save(str(partial))
        partial.replace(path)
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> "Graph":
        """Use a graph where it lies on the disk.

        Raises:
            UserError: usearch is missing, or the file is none of its graphs.
        """
        library = _usearch()
        try:
            return cls(library.Index.restore(str(path), view=True))
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(f"{path} is no graph of usearch: {' '.join(str(error).split())}; embed again") from None

    def nearest(self, queries: Vectors, k: int) -> Found:
        """Nearly the k rows with the highest inner product with each query [Q, D]."""
        found = self._index.search(np.atleast_2d(np.asarray(queries, dtype=np.float16)), k)
        rows, distances = np.atleast_2d(found.keys), np.atleast_2d(found.distances)
        return rows.astype(np.int64), (1 - distances).astype(np.float32)


def _usearch() -> Any:
    try:
        import usearch.index
    except ImportError:
        raise UserError("searching large sets needs usearch: pip install 'mmssl[search]'; or search exactly") from None
    return usearch.index
