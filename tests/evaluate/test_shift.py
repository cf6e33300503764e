"""The drop from one dataset to another, and its interval."""

import math

import numpy as np
import pytest

from mmssl.errors import UserError
from mmssl.evaluate.compare import measure_shifts, parse_shifts
from mmssl.evaluate.datasets import Dataset
from mmssl.rng import generator
from mmssl.stats import newcombe


def dataset(name: str, classnames: tuple[str, ...]) -> Dataset:
    return Dataset(name, ("0.tar",), "classification", classnames, "", None, None, None)


def test_newcombes_own_example() -> None:
    """56/70 and 48/80 differ by 0.2, 95 % interval 0.0524 to 0.3339 (Newcombe 1998, table II, method 10, case a)."""
    assert newcombe((56, 70), (48, 80)) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    assert newcombe((9, 10), (3, 10)) == pytest.approx((0.1705, 0.8090), abs=5e-5)


def test_the_interval_covers_the_truth() -> None:
    """Of 1,000 experiments with a true drop of 0.3, about 95 % have it in their interval."""
    rng = generator(1)
    hits = rng.binomial(60, 0.8, 1000), rng.binomial(80, 0.5, 1000)
    inside = [low <= 0.3 <= high for low, high in (newcombe((a, 60), (b, 80)) for a, b in zip(*hits, strict=True))]
    assert 0.93 <= np.mean(inside) <= 0.98


def test_the_drop_of_every_task() -> None:
    """Each task that has accuracies of both gives a drop, with an interval around it; others give none."""
    results = {
        "a/zero_shot": {"acc1": 0.8, "samples": 50},
        "b/zero_shot": {"acc1": 0.6, "samples": 40},
        "a/geometry": {"alignment": 1.0, "samples": 50},
        "b/geometry": {"alignment": 1.0, "samples": 40},
    }
    found = measure_shifts(results, [("a", "b")])
    assert list(found) == ["a:b/zero_shot"]
    figures = found["a:b/zero_shot"]
    assert math.isclose(figures["drop"], 0.2)
    assert math.isclose(figures["kept"], 0.75)
    assert figures["intervals"]["drop"] == list(newcombe((40, 50), (24, 40)))
    with pytest.raises(UserError, match="--task zero_shot"):
        measure_shifts({"a/geometry": {}, "b/geometry": {}}, [("a", "b")])


def test_pairs_are_two_known_data_sets_of_the_same_classes() -> None:
    """A word without a colon, an unknown name, and other classes are refused with the remedy."""
    known = {"a": dataset("a", ("x", "y")), "b": dataset("b", ("x", "y")), "c": dataset("c", ("x",))}
    assert parse_shifts(["a:b"], known) == [("a", "b")]
    for word in ("a", "a:d", ":b"):
        with pytest.raises(UserError, match="write A:B with two of the datasets a, b, c"):
            parse_shifts([word], known)
    with pytest.raises(UserError, match="different class names"):
        parse_shifts(["a:c"], known)
