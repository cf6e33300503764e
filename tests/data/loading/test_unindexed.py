"""Samples of shards without an index are shuffled in the same order as by WebDataset."""

import random

import pytest
import webdataset

from mmssl.data.loading.unindexed import BUFFER, shuffle_buffer


@pytest.mark.parametrize("count", [0, 1, 249, 250, 999, 1001, 5000])
def test_the_buffer_shuffles_like_webdataset(count: int) -> None:
    """The same order as `webdataset.shuffle` for the same seed, of streams shorter and longer than the buffer."""
    expected = webdataset.shuffle(BUFFER, initial=BUFFER // 4, rng=random.Random(1))(iter(range(count)))
    assert list(shuffle_buffer(iter(range(count)), random.Random(1))) == list(expected)


def test_the_shuffled_order_is_the_golden_one() -> None:
    """The order for a seed is the recorded one."""
    order = list(shuffle_buffer(iter(range(2000)), random.Random(0)))
    assert sorted(order) == list(range(2000))
    assert order[:8] == [216, 98, 194, 227, 107, 10, 132, 248]
