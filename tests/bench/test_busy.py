"""The benchmark of a busy machine: both sides are measured, and the ratio is of pairs."""

from pathlib import Path

import pytest
import yaml

from scripts.bench.busy import BusySpeed, bench_busy
from tests.helpers.tiny_runs import run_tree, write_pairs


def test_the_ratio_is_the_median_of_pairs() -> None:
    """100 -> 50, 200 -> 80 and 100 -> 90 give 0.5, whatever the speeds of other rounds."""
    found = BusySpeed(1, [100.0, 200.0, 100.0], [50.0, 80.0, 90.0])
    assert found.ratio == 0.5
    assert "ratio 0.50" in found.text()


@pytest.mark.slow
def test_both_sides_are_real_runs(tmp_path: Path) -> None:
    """A tiny configuration is trained alone and beside a busy process."""
    shards = tmp_path / "shards"
    shards.mkdir()
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(run_tree(write_pairs(shards), tmp_path / "run")))
    found = bench_busy(str(path), [], steps=2, rounds=1, neighbours=1)
    assert found.alone[0] > 0
    assert found.beside[0] > 0
