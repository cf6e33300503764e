"""Comparisons: two models on the same samples with tests of the differences, and one model on two datasets."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmssl.errors import UserError
from mmssl.evaluate.datasets import Dataset
from mmssl.evaluate.metrics import baselines
from mmssl.evaluate.task import DRAWS, Metrics
from mmssl.evaluate.tasks.retrieval import RECALL_AT
from mmssl.files import read_csv
from mmssl.stats import Interval, bootstrap, holm, is_point, mcnemar, newcombe, over_draws, paired_t, sign_flip

Values = NDArray[np.float64]
Outcomes = tuple[list[str], dict[str, Values]]
"""Names of the samples, and metric -> one value per sample, in the same order."""


LEAST_DRAWS = 3
"""Draws of training samples, or seeds, from which a p-value is computed: two of them agree by chance too often."""


@dataclass(frozen=True)
class Difference:
    """Gain of the second model in the mean of a per-sample value."""

    first: float
    second: float
    interval: Interval
    """95 % interval of second - first, from a bootstrap of the paired samples; for other draws of training samples too,
    if there are some."""
    p_value: float | None
    """Probability of a difference at least this large between equal models; None with one or two draws of training
    samples."""
    spread: float | None = None
    """Standard deviation of the difference over draws of training samples; None without draws."""
    baselines: Mapping[str, float] = field(default_factory=dict)
    """The same value without the image: of the most frequent class (`majority`), and by `chance`."""

    @property
    def difference(self) -> float:
        """second - first."""
        return self.second - self.first


def compare(first: Values, second: Values, seed: int = 0, strata: NDArray[np.int64] | None = None) -> Difference:
    """Compare per-sample values (right or wrong, reciprocal ranks ...) of two models, paired by position, [N] each.

    Values that are all 0 or 1 are tested exactly (McNemar), others by flipping the differences' signs at random.

    Args:
        strata: the class of each sample, [N], for the interval.
    """
    assert first.shape == second.shape
    change = second - first
    mean = bootstrap(lambda rows: {"mean": float(change[rows].mean())}, len(change), seed=seed, strata=strata)["mean"]
    if is_point(mean):  # all samples, or all of each class, change alike: others may not
        gained, lost = (float(np.maximum(sign * change, 0).sum()) for sign in (1, -1))
        mean = newcombe((gained, len(change)), (lost, len(change)))
    binary = bool(np.isin(first, (0, 1)).all() and np.isin(second, (0, 1)).all())
    p_value = mcnemar(int((change > 0).sum()), int((change < 0).sum())) if binary else sign_flip(change, seed)
    return Difference(float(first.mean()), float(second.mean()), mean, p_value)


def compare_draws(
    first: Sequence[Values], second: Sequence[Values], strata: NDArray[np.int64] | None = None
) -> Difference:
    """Compare per-sample values of two models in the same draws of training samples, [draws][N] each.

    A difference must hold for other samples and for other draws: the p-value is the larger one of both tests, over the
    samples and over the draws (Student's t, from three draws on).

    Args:
        strata: the class of each sample, [N], for the interval.
    """
    found = compare(np.mean(first, axis=0), np.mean(second, axis=0), strata=strata)
    return _over_draws(found, [float(b.mean() - a.mean()) for a, b in zip(first, second, strict=True)])


def _over_draws(found: Difference, differences: Sequence[float]) -> Difference:
    """A difference with its spread over draws, whose interval and p-value hold for draws too."""
    spread = float(np.std(differences, ddof=1)) if len(differences) > 1 else None
    found = replace(found, interval=over_draws(found.interval, differences))
    if len(differences) < LEAST_DRAWS or found.p_value is None:
        return replace(found, p_value=None, spread=spread)
    return replace(found, p_value=max(found.p_value, paired_t(differences).p_value), spread=spread)


def significant(differences: Mapping[str, Difference]) -> list[bool]:
    """True for differences that pass Holm's correction at 5 % among all that have a p-value."""
    tested = [d.p_value for d in differences.values() if d.p_value is not None]
    real = iter(holm(tested))
    return [d.p_value is not None and next(real) for d in differences.values()]


def compare_results(first: Path, second: Path) -> dict[str, Difference]:
    """Compare the tables of two evaluations: `NAME/TASK/METRIC` -> difference, for all metrics that both have.

    Metrics are acc1 and acc5 of classifications (from predictions.csv), recall@1, 5 and 10 of retrieval (from
    ranks.csv; the captions of an image count as one sample), and the columns of outcomes.csv.

    Raises:
        UserError: they share no evaluation, or its samples differ.
    """
    found: dict[str, Difference] = {}
    second_outcomes = read_outcomes(second)
    for place, (samples, values) in read_outcomes(first).items():
        if place not in second_outcomes:
            continue
        others, other_values = second_outcomes[place]
        if samples != others:
            raise UserError(
                f"{first / place} and {second / place} have different samples; evaluate both on the same data"
            )
        draws, known = (_draws(first / place), _draws(second / place)), _baselines(first, place)
        for metric in values.keys() & other_values.keys():
            change = compare(values[metric], other_values[metric])
            if all(metric in drawn for drawn in draws):
                change = _over_draws(change, (draws[1][metric] - draws[0][metric]).tolist())
            found[f"{place}/{metric}"] = replace(change, baselines=known.get(metric, {}))
    if not found:
        raise UserError(f"{first} and {second} share no evaluation; give two folders that `mmssl eval --out` wrote")
    return dict(sorted(found.items()))


def read_outcomes(folder: Path) -> dict[str, Outcomes]:
    """Per-sample outcomes below a folder: `NAME/TASK`, or a longer path, -> samples, and values by metric."""
    readers = (("predictions.csv", _predictions), ("ranks.csv", _ranks), ("outcomes.csv", _outcomes))
    return {
        path.relative_to(folder).parent.as_posix(): read(_rows(path))
        for name, read in readers
        for path in sorted(folder.rglob(name))
    }


def verdicts(differences: Mapping[str, Difference], first: str, second: str) -> list[str]:
    """A sentence for each metric that names the better model if the difference is significant (Holm, 5 %)."""
    real = significant(differences)
    return [_verdict(key, d, sure, first, second) for (key, d), sure in zip(differences.items(), real, strict=True)]


def to_json(differences: Mapping[str, Difference]) -> dict[str, dict[str, Any]]:
    """The differences for JSON; `real` marks significant ones (Holm, 5 %)."""
    real = significant(differences)
    return {
        key: {
            "first": d.first,
            "second": d.second,
            "difference": d.difference,
            "interval": list(d.interval),
            "p_value": d.p_value,
            "real": sure,
            **({} if d.spread is None else {"spread": d.spread}),
            **({"baselines": dict(d.baselines)} if d.baselines else {}),
        }
        for (key, d), sure in zip(differences.items(), real, strict=True)
    }


def no_better(d: Difference) -> str:
    """A sentence if the better of the two is no better than an answer without the image; else empty."""
    words = baselines.no_better(max(d.first, d.second), d.baselines)
    return f" The better one is {words}." if words else ""


def _verdict(key: str, d: Difference, sure: bool, first: str, second: str) -> str:
    test = "too few draws for a test" if d.p_value is None else f"p = {d.p_value:.2g}"
    test += "" if d.spread is None else f", {100 * d.spread:.1f} points of spread over draws"
    if sure:
        better, worse, sign = (second, first, 1) if d.difference > 0 else (first, second, -1)
        low, high = sorted(100 * sign * end for end in d.interval)
        size = f"{abs(100 * d.difference):.1f} points ({low:.1f} to {high:.1f})"
        return f"{key}: {better} is better than {worse} by {size} (significant, {test}).{no_better(d)}"
    return (
        f"{key}: no significant difference; {second} minus {first} is {100 * d.difference:+.1f} points "
        f"({100 * d.interval[0]:+.1f} to {100 * d.interval[1]:+.1f}, {test}).{no_better(d)}"
    )


Table = Sequence[Mapping[str, str]]
"""The rows of a CSV file, at least one."""


def _draws(folder: Path) -> dict[str, Values]:
    """Metric -> its value in each draw of training samples, in their order; empty if the task draws none."""
    if not (folder / DRAWS).is_file():
        return {}
    rows = _rows(folder / DRAWS)
    return {name: np.array([float(row[name]) for row in rows]) for name in rows[0] if name != "draw"}


def _baselines(folder: Path, place: str) -> dict[str, dict[str, float]]:
    """The baselines of an evaluation, .../NAME/TASK; empty if its results were not written."""
    home = (folder / place).parents[1]
    try:
        results = json.loads((home / "results.json").read_text(encoding="utf-8"))
        found: dict[str, dict[str, float]] = results["/".join(place.split("/")[-2:])].get("baselines", {})
    except (OSError, ValueError, LookupError, AttributeError):
        return {}
    return found


def _rows(path: Path) -> Table:
    rows = read_csv(path)
    if not rows:
        raise UserError(f"{path} is empty; the evaluation was interrupted: run it again")
    return rows


def _predictions(rows: Table) -> Outcomes:
    values: dict[str, Values] = {}
    for n in (1, 5):
        if f"class{n}" in rows[0]:
            listed = [row["label"] in (row[f"class{k}"] for k in range(1, n + 1)) for row in rows]
            values[f"acc{n}"] = np.array(listed, dtype=np.float64)
    return [f"{_sample(row)} {row['label']}" for row in rows], values


def _ranks(rows: Table) -> Outcomes:
    """Hits are averaged over the captions of an image: they are not independent."""
    images = list(dict.fromkeys((row["shard"], row["key"]) for row in rows))
    number = {image: index for index, image in enumerate(images)}
    values: dict[str, Values] = {}
    for direction in ("image", "text"):
        queries = [row for row in rows if row["retrieval"] == direction]
        owner = np.array([number[row["shard"], row["key"]] for row in queries])
        places = np.array([int(row["place"] or 0) for row in queries])
        for k in RECALL_AT:
            hits = np.bincount(owner, weights=(places > 0) & (places <= k), minlength=len(images))
            values[f"{direction}_retrieval_recall@{k}"] = hits / np.bincount(owner, minlength=len(images))
    return [_sample({"shard": shard, "key": key}) for shard, key in images], values


def _outcomes(rows: Table) -> Outcomes:
    names = [name for name in rows[0] if name not in ("shard", "key")]
    return [_sample(row) for row in rows], {name: np.array([float(row[name]) for row in rows]) for name in names}


def _sample(row: Mapping[str, str]) -> str:
    """The same data may lie in another folder on another machine."""
    return f"{Path(row['shard']).name}:{row['key']}"


def parse_shifts(words: Sequence[str], datasets: Mapping[str, Dataset]) -> list[tuple[str, str]]:
    """Parse pairs of datasets, `A:B`.

    Raises:
        UserError: a word is not a pair, a dataset is unknown, or the classes of the two differ.
    """
    found = []
    for word in words:
        first, colon, second = word.partition(":")
        unknown = [name for name in (first, second) if name not in datasets]
        if not colon or unknown:
            raise UserError(f"--shift {word!r}: write A:B with two of the datasets {', '.join(datasets)}")
        if datasets[first].classnames != datasets[second].classnames:
            raise UserError(f"--shift {word!r}: the two have different class names; give both the same --classnames")
        found.append((first, second))
    return found


def measure_shifts(results: Mapping[str, Metrics], wanted: Sequence[tuple[str, str]]) -> dict[str, Metrics]:
    """`A:B/TASK` -> `drop` of acc1 from A to B and the fraction `kept`, for every task with accuracies of both.

    Taori et al. 2020 call a model effectively robust if it loses less than other models of its accuracy. That
    needs many models; this is the drop of one.

    Raises:
        UserError: no accuracy of a pair was measured.
    """
    found: dict[str, Metrics] = {}
    for first, second in wanted:
        for key, metrics in results.items():
            name, _, task = key.partition("/")
            other = results.get(f"{second}/{task}", {})
            if name == first and "acc1" in metrics and "acc1" in other:
                found[f"{first}:{second}/{task}"] = _shift(metrics, other)
        if not any(key.startswith(f"{first}:{second}/") for key in found):
            raise UserError(f"--shift {first}:{second} compares acc1, which no task measured; add --task zero_shot")
    return found


def _shift(first: Metrics, second: Metrics) -> Metrics:
    before, after = first["acc1"], second["acc1"]
    drop = newcombe(
        (round(before * first["samples"]), first["samples"]), (round(after * second["samples"]), second["samples"])
    )
    kept = {"kept": after / before} if before > 0 else {}
    return (
        {"acc1_first": before, "acc1_second": after, "drop": before - after}
        | kept
        | {"intervals": {"drop": list(drop)}}
    )
