"""How long a search among many stored vectors takes, and how many of the true neighbours it finds."""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mmssl.rng import generator
from mmssl.search.nearest import BLOCK, Graph, exact_nearest

QUERIES = 50
CENTRES = 20_000


@dataclass(frozen=True)
class SearchFigures:
    """What was measured."""

    vectors: int
    dim: int
    build_seconds: float
    exact_ms: float
    """Milliseconds a query, comparing with every vector; median over the queries."""
    graph_ms: float
    """Milliseconds a query, through the graph on the disk; median over the queries."""
    slowest_ms: float
    """The slowest query through the graph."""
    recall: float
    """Part of the 10 true neighbours that the graph finds."""
    graph_bytes: int

    def text(self) -> str:
        """As lines."""
        return (
            f"{self.vectors:,} vectors of {self.dim} dimensions; {QUERIES} queries one at a time, the nearest 10\n"
            f"exact: {self.exact_ms:.1f} ms a query (median)\n"
            f"graph: {self.graph_ms:.1f} ms a query (median), {self.slowest_ms:.1f} ms the slowest, recall@10 "
            f"{self.recall:.3f}; built in {self.build_seconds:.0f} s, {self.graph_bytes / 2**30:.2f} GiB"
        )


def bench_search(vectors: int = 1_000_000, dim: int = 512) -> SearchFigures:
    """Search among made-up unit vectors that lie in clusters, as pictures' do.

    Raises:
        UserError: usearch is missing.
    """
    with tempfile.TemporaryDirectory() as place:
        stored = _clusters(vectors, dim, Path(place) / "vectors.npy")
        start = time.perf_counter()
        graph = Graph.build([stored], dim, Path(place) / "graph.usearch")
        built = time.perf_counter() - start
        rng = generator("bench search", "queries")
        queries = np.asarray(stored[rng.integers(len(stored), size=QUERIES)], dtype=np.float32)
        queries += rng.normal(0, 0.5 * dim**-0.5, queries.shape).astype(np.float32)
        queries /= np.linalg.norm(queries, axis=1, keepdims=True)
        exact_times, graph_times, shared = [], [], 0
        graph.nearest(queries[:1], 10)
        for query in queries:
            start = time.perf_counter()
            rows, _ = exact_nearest(query[None], [stored], 10)
            exact_times.append(time.perf_counter() - start)
            start = time.perf_counter()
            near, _ = graph.nearest(query[None], 10)
            graph_times.append(time.perf_counter() - start)
            shared += len(set(rows[0].tolist()) & set(near[0].tolist()))
        return SearchFigures(
            len(stored),
            dim,
            built,
            1000 * float(np.median(exact_times)),
            1000 * float(np.median(graph_times)),
            1000 * max(graph_times),
            shared / (10 * QUERIES),
            (Path(place) / "graph.usearch").stat().st_size,
        )


def _clusters(count: int, dim: int, path: Path) -> npt.NDArray[np.float16]:
    """Unit vectors, float16 [count, dim], memory-mapped: centres with noise about as long as they are."""
    rng = generator("bench search", "vectors")
    centres = rng.normal(0, dim**-0.5, (min(CENTRES, max(1, count // 20)), dim)).astype(np.float32)
    stored = np.lib.format.open_memmap(path, "w+", np.float16, (count, dim))
    for start in range(0, count, BLOCK):
        stop = min(start + BLOCK, count)
        rows = centres[rng.integers(len(centres), size=stop - start)]
        rows = rows + rng.normal(0, dim**-0.5, rows.shape).astype(np.float32)
        stored[start:stop] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    stored.flush()
    mapped: npt.NDArray[np.float16] = np.load(path, mmap_mode="r")
    return mapped
