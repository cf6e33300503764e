"""The measurement of searching finds true neighbours."""

from scripts.bench.search import bench_search


def test_both_searches_are_measured() -> None:
    """On a small set the graph finds nearly all of the exact search's neighbours; without it only that is measured."""
    found = bench_search(2000, 32)
    assert found.graph is not None
    assert found.graph.recall > 0.9
    assert "recall@10" in found.text()
    alone = bench_search(500, 8, graph=False)
    assert alone.graph is None
    assert "500 vectors of 8 dimensions" in alone.text()
    assert "graph" not in alone.text()
