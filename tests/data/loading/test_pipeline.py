"""Bad samples are logged, and too many of them stop the stream with a one-line error."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from mmssl.data.loading import BadSampleBudget
from mmssl.data.loading.pipeline import LoadedBatch
from mmssl.data.shards import BadSample
from mmssl.errors import UserError


def loaded(samples: int, bad: list[int]) -> LoadedBatch:
    """A batch of `samples` samples, with bad ones at the given rows."""
    return cast(
        LoadedBatch, SimpleNamespace(batch=range(samples), bad=[(i, BadSample("s", f"k{i}", "e")) for i in bad])
    )


def test_the_fraction_is_checked_at_1000_samples(tmp_path: Path) -> None:
    """Too many bad samples in the first thousand are an error even if the last batch of the thousand has none."""
    budget = BadSampleBudget(0.01, tmp_path / "bad.jsonl")
    budget.count(loaded(500, list(range(0, 100, 5))))
    with pytest.raises(UserError, match=r"20 of 1000 samples .* the last one is 'k95' of s") as error:
        budget.count(loaded(500, []))
    assert "\n" not in str(error.value)
    assert len([json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]) == 20


def test_a_row_of_bad_samples_goes_over_from_batch_to_batch() -> None:
    """A hundred in a row stop the stream; one good sample restarts the count."""
    budget = BadSampleBudget(1.0, None)
    budget.count(loaded(60, list(range(60))))
    budget.count(loaded(60, [*range(39), *range(40, 60)]))
    budget.count(loaded(60, list(range(60))))
    with pytest.raises(UserError, match="100 samples in a row"):
        budget.count(loaded(60, list(range(20))))
