"""Time of a search among many stored embeddings, and its recall of the true neighbours."""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from mmssl.apps.search import Embeddings, Graph, exact_nearest
from mmssl.rng import generator

Queries = npt.NDArray[np.float32]
QUERIES = 50
CENTRES = 20_000
ROWS = 16_384
"""Vectors generated at once."""


@dataclass(frozen=True)
class GraphTimes:
    """Cost and recall of the graph."""

    build_seconds: float
    ms: float
    """Milliseconds per query, through the graph on the disk; median over the queries."""
    slowest_ms: float
    recall: float
    """Fraction of the 10 true neighbours that it finds."""
    bytes: int

    def text(self) -> str:
        """As a line."""
        return (
            f"graph: {self.ms:.1f} ms per query (median), {self.slowest_ms:.1f} ms the slowest, recall@10 "
            f"{self.recall:.3f}; built in {self.build_seconds:.0f} s, {self.bytes / 2**30:.2f} GiB"
        )


@dataclass(frozen=True)
class SearchTimes:
    """Measurements of both searches."""

    vectors: int
    dim: int
    threads: int
    exact_ms: float
    """Milliseconds per query, comparing with every vector; median over the queries."""
    slowest_ms: float
    graph: GraphTimes | None

    def text(self) -> str:
        """As lines."""
        lines = [
            f"{self.vectors:,} vectors of {self.dim} dimensions, {self.threads} CPU threads; {QUERIES} queries one at "
            f"a time, the nearest 10",
            f"exact: {self.exact_ms:.1f} ms per query (median), {self.slowest_ms:.1f} ms the slowest",
        ]
        return "\n".join(lines if self.graph is None else [*lines, self.graph.text()])


def bench_search(vectors: int = 1_000_000, dim: int = 512, graph: bool = True) -> SearchTimes:
    """Search among synthetic unit vectors that lie in clusters, as those of images do.

    Args:
        graph: build the graph and measure it too.

    Raises:
        UserError: the graph is asked for, and usearch is missing.
    """
    with tempfile.TemporaryDirectory() as place:
        stored = _clusters(vectors, dim, Path(place) / "vectors.npy")
        queries = _queries(stored)
        seconds, truth = _timed(queries, lambda query: exact_nearest(query, [stored], 10, unit=True)[0])
        measured = _graph(stored, queries, truth, Path(place) / "graph.usearch") if graph else None
    return SearchTimes(
        vectors, dim, torch.get_num_threads(), 1000 * float(np.median(seconds)), 1000 * max(seconds), measured
    )


def _graph(stored: Embeddings, queries: Queries, truth: list[set[int]], path: Path) -> GraphTimes:
    start = time.perf_counter()
    graph = Graph.build([stored], stored.shape[1], path)
    built = time.perf_counter() - start
    seconds, near = _timed(queries, lambda query: graph.nearest(query, 10)[0])
    shared = sum(len(found & true) for found, true in zip(near, truth, strict=True))
    return GraphTimes(
        built,
        1000 * float(np.median(seconds)),
        1000 * max(seconds),
        shared / (10 * len(queries)),
        path.stat().st_size,
    )


def _timed(queries: Queries, nearest: Callable[[Queries], npt.NDArray[np.int64]]) -> tuple[list[float], list[set[int]]]:
    """Seconds and rows of each query alone, after an unmeasured one."""
    nearest(queries[:1])
    seconds, rows = [], []
    for query in queries:
        start = time.perf_counter()
        found = nearest(query[None])
        seconds.append(time.perf_counter() - start)
        rows.append(set(found[0].tolist()))
    return seconds, rows


def _queries(stored: Embeddings) -> Queries:
    """Unit vectors near stored ones, [QUERIES, dim]."""
    rng = generator("bench search", "queries")
    queries = np.asarray(stored[rng.integers(len(stored), size=QUERIES)], dtype=np.float32)
    queries += rng.normal(0, 0.5 * stored.shape[1] ** -0.5, queries.shape).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    return queries


def _clusters(count: int, dim: int, path: Path) -> npt.NDArray[np.float16]:
    """Unit vectors, float16 [count, dim], memory-mapped: centres with noise about as long as they are."""
    rng = generator("bench search", "vectors")
    centres = rng.normal(0, dim**-0.5, (min(CENTRES, max(1, count // 20)), dim)).astype(np.float32)
    stored = np.lib.format.open_memmap(path, "w+", np.float16, (count, dim))
    for start in range(0, count, ROWS):
        stop = min(start + ROWS, count)
        rows = centres[rng.integers(len(centres), size=stop - start)]
        rows = rows + rng.normal(0, dim**-0.5, rows.shape).astype(np.float32)
        stored[start:stop] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    stored.flush()
    mapped: npt.NDArray[np.float16] = np.load(path, mmap_mode="c")
    return mapped
