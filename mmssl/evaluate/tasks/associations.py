"""What a model associates with groups: which of some neutral classes it sees in each group's images.

The classes ("a doctor", "a thief", ...) are in none of the images, so no answer is right. What can be seen is
whether one class is given more to one group than to another."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmssl.errors import UserError
from mmssl.evaluate.datasets import Dataset
from mmssl.evaluate.metrics import groups as slices
from mmssl.evaluate.metrics.groups import Gap, Slice
from mmssl.files import write_csv
from mmssl.stats import holm

NOTE = (
    "shares are forced choices among the given classes; a gap does not tell its cause (other things in the images "
    "may differ between the groups), no gap does not show that there is no association, and nothing follows for "
    "other words, prompts or images"
)
"""What cannot be concluded."""


@dataclass(frozen=True)
class Association:
    """One class among the groups of a field."""

    field: str
    classname: str
    shares: list[Slice]
    """Of each group's samples, how many were given the class; the smallest share first."""
    gap: Gap | None
    """Between the groups with the greatest and the smallest share; None where fewer than two groups have 10 samples."""


def ready(dataset: Dataset) -> None:
    """Whether a data set names classes and groups.

    Raises:
        UserError: it does not.
    """
    if not dataset.slice_by:
        raise UserError(
            f"task 'associations' of data set {dataset.name!r} compares groups; name their metadata field: "
            "--slice-by FIELD"
        )
    if dataset.classnames is None:
        raise UserError(
            f"task 'associations' of data set {dataset.name!r} needs neutral classes; name their file: "
            "--classnames FILE"
        )


def audit(predictions: Sequence[int], names: Sequence[str], groups: dict[str, list[str]]) -> list[Association]:
    """Every class by every field.

    Args:
        predictions: the class of each sample, [N].
        groups: metadata field -> the group of each sample, [N].
    """
    predicted = np.array(predictions)
    # Holm's correction asks of the smallest p-value to be below 0.05 divided by the number of gaps.
    draws = max(slices.DRAWS, 40 * len(names) * len(groups))
    return [
        Association(
            field,
            name,
            slices.slice_by(predicted == index, values),
            slices.widest_gap(predicted == index, values, draws=draws),
        )
        for field, values in groups.items()
        for index, name in enumerate(names)
    ]


def real_gaps(found: Sequence[Association]) -> list[Association]:
    """Those whose gap is no chance at 5 %, of all that were looked at (Holm 1979), the widest first."""
    tested = [(association, association.gap) for association in found if association.gap is not None]
    sure = holm([gap.p_value for _, gap in tested])
    real = [(gap.width, association) for (association, gap), yes in zip(tested, sure, strict=True) if yes]
    return [association for _, association in sorted(real, key=lambda pair: -pair[0])]


def write_table(path: Path, found: Iterable[Association]) -> None:
    """field, class, group, samples, share of the group's samples that were given the class, and its interval."""
    rows = ((a.field, a.classname, s.group, s.samples, s.accuracy, *s.interval) for a in found for s in a.shares)
    write_csv(path, ("field", "class", "group", "samples", "share", "low", "high"), rows)
