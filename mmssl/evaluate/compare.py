"""Two models on the same samples: which differences are real."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmssl.errors import UserError
from mmssl.evaluate.tasks.retrieval import RECALL_AT
from mmssl.files import read_csv
from mmssl.stats import Interval, bootstrap, holm, mcnemar, sign_flip

Values = NDArray[np.float64]
Outcomes = tuple[list[str], dict[str, Values]]
"""Samples by name, and figure -> one value a sample, in the same order."""
PAIRED_TASKS = ("zero_shot", "retrieval", "linear_probe", "few_shot", "knn", "fine_tune", "corruptions")
"""Tasks whose figures are means over samples, of each of which they keep an outcome."""


@dataclass(frozen=True)
class Difference:
    """How much better the second model is in the mean of a per-sample value."""

    first: float
    second: float
    interval: Interval
    """Of second - first, from a bootstrap of the paired samples."""
    p_value: float
    """Probability of a difference at least as large if the two models were alike."""

    @property
    def difference(self) -> float:
        """second - first."""
        return self.second - self.first


def compare(first: Values, second: Values, seed: int = 0) -> Difference:
    """Compare per-sample values (right or wrong, reciprocal ranks ...) of two models, paired by place, [N] each.

    Values that are all 0 or 1 are tested exactly (McNemar), others by flipping the differences' signs at random.
    """
    assert first.shape == second.shape
    change = second - first
    interval = bootstrap(lambda rows: {"mean": float(change[rows].mean())}, len(change), seed=seed)["mean"]
    binary = bool(np.isin(first, (0, 1)).all() and np.isin(second, (0, 1)).all())
    p_value = mcnemar(int((change > 0).sum()), int((change < 0).sum())) if binary else sign_flip(change, seed)
    return Difference(float(first.mean()), float(second.mean()), interval, p_value)


def compare_results(first: Path, second: Path) -> dict[str, Difference]:
    """Compare what two evaluations left in their folders: `NAME/TASK/FIGURE` -> difference, for all that both have.

    Figures are acc1 and acc5 of classifications (from predictions.csv), recall@1, 5 and 10 of retrieval (from
    ranks.csv; an image's captions count as one sample), and the columns of outcomes.csv.

    Raises:
        UserError: they share no evaluation, or one was made on other samples.
    """
    found: dict[str, Difference] = {}
    theirs = read_outcomes(second)
    for place, (samples, values) in read_outcomes(first).items():
        if place not in theirs:
            continue
        others, other_values = theirs[place]
        if samples != others:
            raise UserError(
                f"{first / place} and {second / place} are of other samples; evaluate both on the same data"
            )
        for figure in values.keys() & other_values.keys():
            found[f"{place}/{figure}"] = compare(values[figure], other_values[figure])
    if not found:
        raise UserError(f"{first} and {second} share no evaluation; give two folders that `mmssl eval --out` wrote")
    return dict(sorted(found.items()))


def read_outcomes(folder: Path) -> dict[str, Outcomes]:
    """What evaluations in a folder kept of each sample: `NAME/TASK` (or `FOLDER/NAME/TASK`, where they lie deeper) ->
    the samples, and their values by figure."""
    readers = (("predictions.csv", _predictions), ("ranks.csv", _ranks), ("outcomes.csv", _outcomes))
    return {
        path.relative_to(folder).parent.as_posix(): read(_rows(path))
        for name, read in readers
        for path in sorted(folder.rglob(name))
    }


def verdicts(differences: Mapping[str, Difference], first: str, second: str) -> list[str]:
    """A sentence for each figure: which model is better, if that is real (Holm, 5 %)."""
    real = holm([d.p_value for d in differences.values()])
    return [_verdict(key, d, sure, first, second) for (key, d), sure in zip(differences.items(), real, strict=True)]


def to_json(differences: Mapping[str, Difference]) -> dict[str, dict[str, Any]]:
    """As JSON holds them, with whether each is real (Holm, 5 %)."""
    real = holm([d.p_value for d in differences.values()])
    return {
        key: {
            "first": d.first,
            "second": d.second,
            "difference": d.difference,
            "interval": list(d.interval),
            "p_value": d.p_value,
            "real": sure,
        }
        for (key, d), sure in zip(differences.items(), real, strict=True)
    }


def _verdict(key: str, d: Difference, sure: bool, first: str, second: str) -> str:
    if sure:
        better, worse, sign = (second, first, 1) if d.difference > 0 else (first, second, -1)
        low, high = sorted(100 * sign * end for end in d.interval)
        size = f"{abs(100 * d.difference):.1f} points ({low:.1f} to {high:.1f})"
        return f"{key}: {better} is better than {worse} by {size}; this is real (p = {d.p_value:.2g})."
    return (
        f"{key}: no real difference is shown; {second} less {first} is {100 * d.difference:+.1f} points "
        f"({100 * d.interval[0]:+.1f} to {100 * d.interval[1]:+.1f}, p = {d.p_value:.2g})."
    )


Table = Sequence[Mapping[str, str]]
"""The rows of a CSV file, at least one."""


def _rows(path: Path) -> Table:
    rows = read_csv(path)
    if not rows:
        raise UserError(f"{path} is empty; the evaluation was interrupted, make it again")
    return rows


def _predictions(rows: Table) -> Outcomes:
    figures = {}
    for n in (1, 5):
        if f"class{n}" in rows[0]:
            listed = [row["label"] in (row[f"class{k}"] for k in range(1, n + 1)) for row in rows]
            figures[f"acc{n}"] = np.array(listed, dtype=np.float64)
    return [f"{_sample(row)} {row['label']}" for row in rows], figures


def _ranks(rows: Table) -> Outcomes:
    """Hits are averaged over the captions of an image: they are not independent."""
    images = list(dict.fromkeys((row["shard"], row["key"]) for row in rows))
    number = {image: index for index, image in enumerate(images)}
    figures = {}
    for direction in ("image", "text"):
        queries = [row for row in rows if row["retrieval"] == direction]
        owner = np.array([number[row["shard"], row["key"]] for row in queries])
        places = np.array([int(row["place"] or 0) for row in queries])
        for k in RECALL_AT:
            hits = np.bincount(owner, weights=(places > 0) & (places <= k), minlength=len(images))
            figures[f"{direction}_retrieval_recall@{k}"] = hits / np.bincount(owner, minlength=len(images))
    return [_sample({"shard": shard, "key": key}) for shard, key in images], figures


def _outcomes(rows: Table) -> Outcomes:
    names = [name for name in rows[0] if name not in ("shard", "key")]
    return [_sample(row) for row in rows], {name: np.array([float(row[name]) for row in rows]) for name in names}


def _sample(row: Mapping[str, str]) -> str:
    """The same data may lie in another folder on another machine."""
    return f"{Path(row['shard']).name}:{row['key']}"
