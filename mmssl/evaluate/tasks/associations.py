"""Associations of a model with groups: the neutral classes it chooses for each group's images.

The classes ("a doctor", "a thief", ...) are in none of the images, so no answer is correct. The audit shows whether one
class is chosen more often for one group than for another."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmssl.errors import UserError
from mmssl.evaluate.datasets import Dataset
from mmssl.evaluate.metrics import groups, ranking
from mmssl.evaluate.metrics.groups import Gap, GroupAccuracy
from mmssl.evaluate.task import Metrics, Task, TaskContext
from mmssl.files import write_csv
from mmssl.stats import holm

NOTE = (
    "fractions are forced choices among the given classes; a gap does not show its cause (other things in the images "
    "may differ between the groups), the absence of a gap does not show the absence of an association, and "
    "nothing follows for other words, prompts or images"
)
"""Limits of the conclusions."""


class Associations(Task):
    """Forced choice among neutral classes, by group."""

    name = "associations"
    label = "associations with groups"
    description = "Neutral classes chosen for the images of each group."
    main_metrics = ("real_gaps",)

    def ready(self, dataset: Dataset) -> None:
        """Require class names and fields to group by."""
        if not dataset.slice_by:
            raise UserError(
                f"task 'associations' of dataset {dataset.name!r} compares groups; name their metadata field: "
                "--slice-by FIELD"
            )
        if dataset.classnames is None:
            raise UserError(
                f"task 'associations' of dataset {dataset.name!r} needs neutral classes; name their file: "
                "--classnames FILE"
            )

    def run(self, context: TaskContext) -> Metrics:
        """The gap of each class in each field, and the number of gaps that are significant."""
        names, samples = context.dataset.classnames, context.images.samples
        assert names is not None
        predictions = ranking.top_k(context.images.features, context.class_weights(names), 1).first.tolist()
        members = {field: groups.group_rows(samples, field) for field in context.dataset.slice_by}
        found = audit(predictions, names, members)
        if context.folder is not None:
            write_table(context.folder / "associations.csv", found)
        gaps = {f"{a.field}: {a.classname}": None if a.gap is None else vars(a.gap) for a in found}
        counts = {"classes": len(names), "samples": len(predictions), "real_gaps": len(real_gaps(found))}
        return counts | {"gaps": gaps, "note": NOTE}


@dataclass(frozen=True)
class Association:
    """One class among the groups of a field."""

    field: str
    classname: str
    shares: list[GroupAccuracy]
    """Fraction of each group's samples that were given the class, the smallest first."""
    gap: Gap | None
    """Gap between the groups with the largest and smallest fraction; None with fewer than two groups of 10 samples."""


def audit(predictions: Sequence[int], names: Sequence[str], members: dict[str, list[str]]) -> list[Association]:
    """Every class by every field.

    Args:
        predictions: the class of each sample, [N].
        members: metadata field -> the group of each sample, [N].
    """
    predicted = np.array(predictions)
    # Under Holm's correction the smallest p-value must be below 0.05 divided by the number of gaps.
    draws = max(groups.DRAWS, 40 * len(names) * len(members))
    return [
        Association(
            field,
            name,
            groups.group_accuracies(predicted == index, values),
            groups.widest_gap(predicted == index, values, draws=draws),
        )
        for field, values in members.items()
        for index, name in enumerate(names)
    ]


def real_gaps(found: Sequence[Association]) -> list[Association]:
    """Associations whose gap is significant at 5 % after Holm's correction (1979), the widest first."""
    tested = [(association, association.gap) for association in found if association.gap is not None]
    sure = holm([gap.p_value for _, gap in tested])
    real = [(gap.width, association) for (association, gap), yes in zip(tested, sure, strict=True) if yes]
    return [association for _, association in sorted(real, key=lambda pair: -pair[0])]


def write_table(path: Path, found: Iterable[Association]) -> None:
    """field, class, group, samples, fraction of the group's samples that were given the class, and its interval."""
    rows = ((a.field, a.classname, s.group, s.samples, s.accuracy, *s.interval) for a in found for s in a.shares)
    write_csv(path, ("field", "class", "group", "samples", "share", "low", "high"), rows)
