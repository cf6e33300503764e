"""The measurement of the cache of resized images runs its three cases and counts what they kept."""

from scripts.bench.cache import CASES, CacheRates, bench_cache


def test_all_cases_are_measured() -> None:
    """Every case has a rate per round, and the cache holds less than the originals."""
    found = bench_cache(256, 64, 64, rounds=1)
    assert [len(found.per_cpu_second[case]) for case in CASES] == [1, 1, 1]
    assert 0 < found.kept_bytes < found.original_bytes
    assert "second epoch" in found.text()


def test_ratios_are_of_the_same_round() -> None:
    """The gain is the median of the rounds' own ratios."""
    rates = {"no cache": [10.0, 20.0, 40.0], "first epoch": [8.0, 16.0, 32.0], "second epoch": [50.0, 80.0, 120.0]}
    found = CacheRates("x", rates, 10, 1)
    assert found.gain() == 4.0
    assert found.text().splitlines()[4].split() == ["second", "epoch", "80", "[50,", "120]", "4.00", "[3.00,", "5.00]"]
