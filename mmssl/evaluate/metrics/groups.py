"""Accuracy of groups of samples, by a field of the metadata.

A gap between groups describes this model on this data. It does not show the cause: groups may differ in their
classes or in the quality of their images, and small groups differ by chance. Hence the intervals, the sizes, and the
probability of a gap this wide among groups drawn at random."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmssl.errors import UserError
from mmssl.rng import generator
from mmssl.stats import Interval, wilson
from mmssl.types import Sample

Correct = NDArray[np.bool_]
DRAWS = 10_000
"""Random draws of groups for the p-value of a gap."""


@dataclass(frozen=True)
class GroupAccuracy:
    """The accuracy of one group."""

    group: str
    samples: int
    accuracy: float
    interval: Interval
    """95 % Wilson score interval of the accuracy."""


@dataclass(frozen=True)
class Gap:
    """The widest difference between groups."""

    best: str
    worst: str
    width: float
    """Accuracy of the best group less that of the worst."""
    p_value: float
    """Probability of a gap at least as wide if the groups were drawn at random among the same samples."""


def group_rows(samples: Sequence[Sample], field: str) -> list[str]:
    """The group of each sample: the value of a metadata field as text, `(none)` where it is missing or empty.

    Raises:
        UserError: no sample has the field, or its values are lists or objects.
    """
    values = [sample.fields.get(field) for sample in samples]
    if all(value is None for value in values):
        known = ", ".join(sorted({name for sample in samples for name in sample.fields})) or "none"
        raise UserError(f"no sample of {samples[0].shard} has a field {field!r} to group by; its fields are {known}")
    if not all(isinstance(value, Hashable) for value in values):
        raise UserError(f"field {field!r} holds lists or objects; group by a field with one word or number per sample")
    return ["(none)" if value is None or not str(value).strip() else str(value) for value in values]


def group_accuracies(correct: Correct, groups: Sequence[str]) -> list[GroupAccuracy]:
    """The accuracy of each group, the worst first.

    Args:
        correct: True where a sample is right, [N]. groups: its group, [N].
    """
    names, sizes, hits = _counts(correct, groups)
    rows = zip(names, sizes.tolist(), hits.tolist(), strict=True)
    found = [GroupAccuracy(name, n, k / n, wilson(k, n)) for name, n, k in rows]
    return sorted(found, key=lambda s: (s.accuracy, s.group))


def widest_gap(
    correct: Correct, groups: Sequence[str], at_least: int = 10, draws: int = DRAWS, seed: int = 0
) -> Gap | None:
    """The gap between the best and the worst group of `at_least` samples; None with fewer than two such groups.

    Args:
        correct: True where a sample is right, [N]. groups: its group, [N].
        draws: number of random groupings; the p-value is at least 1 / (draws + 1).
    """
    names, sizes, hits = _counts(correct, groups)
    large = (sizes >= at_least).nonzero()[0]
    if len(large) < 2:
        return None
    rates = hits[large] / sizes[large]
    width = float(np.ptp(rates))
    # Correct samples per random group: a multivariate hypergeometric draw.
    urns = [*sizes[large].tolist(), len(correct) - int(sizes[large].sum())]
    drawn = generator(seed, "gap").multivariate_hypergeometric(urns, int(hits.sum()), draws, method="marginals")
    as_wide = int((np.ptp(drawn[:, :-1] / sizes[large], axis=1) >= width - 1e-12).sum())
    best, worst = names[large[rates.argmax()]], names[large[rates.argmin()]]
    return Gap(best, worst, width, (as_wide + 1) / (draws + 1))


def _counts(correct: Correct, groups: Sequence[str]) -> tuple[list[str], NDArray[np.int64], NDArray[np.int64]]:
    """The groups in name order, their sizes, and the number of right samples of each."""
    names = sorted(set(groups))
    place = {name: index for index, name in enumerate(names)}
    index = np.array([place[group] for group in groups])
    sizes, hits = (np.bincount(rows, minlength=len(names)) for rows in (index, index[correct]))
    return names, sizes, hits
