"""Two models on the same samples: which differences are real."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmssl.evaluate.interval import Interval, bootstrap
from mmssl.evaluate.retrieval import RECALL_AT
from mmssl.rng import generator
from mmssl.types import UserError

Values = NDArray[np.float64]
Outcomes = tuple[list[str], dict[str, Values]]
"""Samples by name, and figure -> one value a sample, in the same order."""
PERMUTATIONS = 10_000
PAIRED_TASKS = ("zero_shot", "retrieval", "linear_probe", "knn")
"""Tasks that keep an outcome of each sample."""


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

    Figures are acc1 and acc5 of classifications (from predictions.csv), and recall@1, 5 and 10 of retrieval (from
    ranks.csv; a picture's captions count as one sample).

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
    """What an evaluation kept of each sample: `NAME/TASK` -> the samples, and their values by figure."""
    readers = (("predictions.csv", _read_predictions), ("ranks.csv", _read_ranks))
    return {
        path.relative_to(folder).parent.as_posix(): read(path)
        for name, read in readers
        for path in sorted(folder.glob(f"*/*/{name}"))
    }


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided p-value: of equal models each changed sample is gained or lost with probability 1/2."""
    changed = gained + lost
    if gained == lost:
        return 1.0
    terms = [_log_choose(changed, k) - changed * math.log(2) for k in range(min(gained, lost) + 1)]
    return min(1.0, 2 * math.fsum(math.exp(term) for term in terms))


def sign_flip(change: Values, seed: int = 0, permutations: int = PERMUTATIONS) -> float:
    """Two-sided p-value of the mean if each difference is as likely to have the other sign, [N]."""
    rng = generator(seed, "sign flip")
    observed = abs(change.sum())
    extreme = 1
    for _ in range(permutations):
        signs = rng.integers(0, 2, len(change)) * 2 - 1
        # Sums in another order differ in the last bits; equal ones must count.
        extreme += int(abs((signs * change).sum()) >= observed * (1 - 1e-12))
    return extreme / (permutations + 1)


def holm(p_values: Sequence[float], level: float = 0.05) -> list[bool]:
    """Which differences are real, with a chance of any false alarm of at most `level` (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    real = [False] * len(p_values)
    for place, index in enumerate(order):
        if p_values[index] > level / (len(p_values) - place):
            break
        real[index] = True
    return real


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
    ends = sorted(abs(100 * end) for end in d.interval)
    if sure:
        better, worse = (second, first) if d.difference > 0 else (first, second)
        size = f"{abs(100 * d.difference):.1f} points ({ends[0]:.1f} to {ends[1]:.1f})"
        return f"{key}: {better} is better than {worse} by {size}; this is real (p = {d.p_value:.2g})."
    return (
        f"{key}: no real difference is shown; {second} less {first} is {100 * d.difference:+.1f} points "
        f"({100 * d.interval[0]:+.1f} to {100 * d.interval[1]:+.1f}, p = {d.p_value:.2g})."
    )


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _read_predictions(path: Path) -> tuple[list[str], dict[str, Values]]:
    rows = _read_csv(path)
    figures = {}
    for n in (1, 5):
        if f"class{n}" in rows[0]:
            listed = [row["label"] in (row[f"class{k}"] for k in range(1, n + 1)) for row in rows]
            figures[f"acc{n}"] = np.array(listed, dtype=np.float64)
    return [f"{_sample(row)} {row['label']}" for row in rows], figures


def _read_ranks(path: Path) -> tuple[list[str], dict[str, Values]]:
    """Hits are averaged over the captions of a picture: they are not independent."""
    rows = _read_csv(path)
    samples = list(dict.fromkeys(_sample(row) for row in rows))
    place = {sample: index for index, sample in enumerate(samples)}
    figures = {}
    for direction in ("image", "text"):
        queries = [row for row in rows if row["retrieval"] == direction]
        owner = np.array([place[_sample(row)] for row in queries])
        ranks = np.array([float(row["rank"]) for row in queries])
        for k in RECALL_AT:
            hits = np.bincount(owner, weights=ranks <= k, minlength=len(samples))
            figures[f"{direction}_retrieval_recall@{k}"] = hits / np.bincount(owner, minlength=len(samples))
    return samples, figures


def _sample(row: dict[str, str]) -> str:
    """The same data may lie in another folder on another machine."""
    return f"{Path(row['shard']).name}:{row['key']}"


def _read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
