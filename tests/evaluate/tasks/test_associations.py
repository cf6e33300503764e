"""Neutral classes by group: shares, gaps, and what is refused."""

import csv
import io
from pathlib import Path

import pytest

from mmssl.errors import UserError
from mmssl.evaluate import suite
from mmssl.evaluate.datasets import open_dataset
from mmssl.evaluate.tasks.associations import NOTE, audit, real_gaps
from mmssl.rng import generator
from tests.helpers.toy_encoder import ToyEncoder, pack, paint


def test_shares_are_counts_by_group() -> None:
    """Each group's shares are the counts of its predictions and sum to 1 over the classes."""
    rng = generator(1)
    predictions, groups = rng.integers(0, 3, 90).tolist(), [f"g{i}" for i in rng.integers(0, 2, 90)]
    found = audit(predictions, ["x", "y", "z"], {"who": groups})
    assert [a.classname for a in found] == ["x", "y", "z"]
    for index, association in enumerate(found):
        for s in association.shares:
            inside = [p == index for p, g in zip(predictions, groups, strict=True) if g == s.group]
            assert (s.samples, s.accuracy) == (len(inside), pytest.approx(sum(inside) / len(inside)))
    assert sum(s.accuracy for a in found for s in a.shares if s.group == "g0") == pytest.approx(1)


def test_a_planted_association_is_found_and_chance_is_not() -> None:
    """A class given to 8 of 10 of one group and 2 of 10 of the other is real; classes drawn at random are not."""
    rng = generator(2)
    groups = ["a"] * 60 + ["b"] * 60
    planted = [0] * 48 + [1] * 12 + [0] * 12 + [1] * 48
    real = real_gaps(audit(planted, ["x", "y"], {"who": groups}))
    assert {a.classname for a in real} == {"x", "y"}
    gap = next(a.gap for a in real if a.classname == "x")
    assert gap is not None
    assert (gap.best, gap.worst, gap.width) == ("a", "b", pytest.approx(0.6))
    assert real_gaps(audit(rng.integers(0, 4, 120).tolist(), list("wxyz"), {"who": groups})) == []


def test_an_association_is_found_among_many_classes() -> None:
    """A class that only one group is given is real, whether 60 or 300 others were looked at."""
    rng = generator(3)
    groups = ["a"] * 100 + ["b"] * 100
    for classes in (60, 300):
        predictions = [0] * 60 + rng.integers(1, classes, 140).tolist()
        found = real_gaps(audit(predictions, [str(c) for c in range(classes)], {"who": groups}))
        assert [a.classname for a in found] == ["0"]


def test_the_task_reads_groups_and_needs_no_labels(tmp_path: Path) -> None:
    """Images without any label are audited; the table has a row for each class and group, the figures the note."""
    records = [{"png": paint(100 + i % 2, i), "json": {"style": f"s{i % 2}"}} for i in range(40)]
    shard = pack(tmp_path / "a-0.tar", records)
    names = ["number 100", "number 101", "number 102"]
    data = open_dataset(shard, classnames=names, templates=("{c}",), slice_by=["style"])
    found = suite.run(ToyEncoder(), {"a": (data, "associations")}, tmp_path / "out")["a/associations"]
    assert (found["classes"], found["samples"], found["real_gaps"]) == (3, 40, 2)
    assert found["gaps"]["style: number 100"]["width"] == 1.0
    assert found["note"] == NOTE
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out" / "a" / "associations" / "associations.csv").read_text())))
    assert len(rows) == 6
    shares = {(row["class"], row["group"]): float(row["share"]) for row in rows}
    assert shares["number 100", "s0"] == shares["number 101", "s1"] == 1.0


def test_groups_and_classes_are_needed(numbers: Path, tmp_path: Path) -> None:
    """Without a field to group by, or without classes, the dataset is refused before it is read."""
    encoder = ToyEncoder()
    with pytest.raises(UserError, match="--slice-by FIELD"):
        suite.run(encoder, {"n": (numbers, "associations")})
    (numbers / "classnames.txt").unlink()
    with pytest.raises(UserError, match="--classnames FILE"):
        suite.run(encoder, {"n": (open_dataset(numbers, slice_by=["style"]), "associations")})
    assert encoder.calls == []
