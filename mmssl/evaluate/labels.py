"""Labels and captions of samples."""

import logging
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmssl.data.transforms import captions
from mmssl.errors import UserError
from mmssl.evaluate.datasets import CLASSNAMES_FILE, Dataset
from mmssl.types import Sample

NO_NAMES = (
    f"no class names for the labels {{place}}; put {CLASSNAMES_FILE} there (one name per line), or give a file: "
    "--classnames FILE"
)
_log = logging.getLogger(__name__)


class UnusableSampleError(UserError):
    """One sample lacks what a task needs; others of its dataset may have it."""

    def __init__(self, sample: Sample, reason: str) -> None:
        """Args:
        reason: what is wrong, without the name of the sample, so that samples can be counted by it.
        """
        super().__init__(f"{locate(sample)}: {reason}")
        self.reason = reason


def sample_label(dataset: Dataset, sample: Sample) -> int | str:
    """The class index of a sample, or its class name if the dataset has no list of class names.

    Raises:
        UnusableSampleError: the sample has no label, an empty one, or -1.
        UserError: its label does not fit the class names.
    """
    field = _label_field(dataset, sample)
    value = sample.fields[field]
    if value is None or str(value).strip() == "" or (isinstance(value, float) and math.isnan(value)):
        raise UnusableSampleError(sample, f"its label {field!r} is empty")
    return label_index(dataset, sample, value)


def label_index(dataset: Dataset, sample: Sample, value: Any) -> int | str:
    """One label of a sample: the class index, or the class name if the dataset has no list of class names.

    Raises:
        UserError: it does not fit the class names, or is a number although there are no class names.
    """
    names = dataset.classnames
    if names is None:
        if isinstance(value, int) and dataset.label is None:
            raise UserError(NO_NAMES.format(place=f"in {Path(sample.shard).parent}"))
        return str(value)
    index = value if isinstance(value, int) else dataset.positions.get(str(value))
    if index is None and dataset.values_may_differ:
        return str(value)  # `class_indices` has seen all labels
    if index is None:
        raise UserError(
            f"label {value!r} of {locate(sample)} is not among the {len(names)} class names "
            f"of {dataset.classnames_source}; add it there"
        )
    if index == -1:  # the usual mark of a sample without a label
        raise UnusableSampleError(sample, "label -1 marks a sample without a class")
    if not 0 <= index < len(names):
        raise UserError(
            f"label {index} of {locate(sample)} does not fit the {len(names)} class names "
            f"of {dataset.classnames_source} (0 to {len(names) - 1}); give the names of these shards"
        )
    return index


def class_indices(dataset: Dataset, samples: Sequence[Sample]) -> tuple[tuple[str, ...], Tensor]:
    """Class names and the class of each sample, int64 [N]. Without class names: the distinct labels in order.

    Raises:
        UserError: some labels fit the class names and others do not.
    """
    labels = [sample_label(dataset, sample) for sample in samples]
    other = next((place for place, label in enumerate(labels) if isinstance(label, str)), None)
    if dataset.classnames is not None and other is None:
        return dataset.classnames, torch.tensor(labels, dtype=torch.int64)
    if dataset.classnames is not None and other is not None:
        if any(isinstance(label, int) for label in labels):
            raise UserError(
                f"label {labels[other]!r} of {locate(samples[other])} is not among the {len(dataset.classnames)} class "
                f"names of {dataset.classnames_source}, but others are; add it there"
            )
        _log.warning("no value of %r is in %s: the classes are its values", dataset.label, dataset.classnames_source)
    names = in_order(str(label) for label in labels)
    position = {name: index for index, name in enumerate(names)}
    return names, torch.tensor([position[str(label)] for label in labels], dtype=torch.int64)


def in_order(labels: Iterable[str]) -> tuple[str, ...]:
    """Distinct labels: whole numbers by their value, then others by their letters."""

    def place(label: str) -> tuple[bool, int, str]:
        number = label.removeprefix("-")
        is_number = number.isascii() and number.isdigit()
        return not is_number, int(label) if is_number else 0, label

    return tuple(sorted(set(labels), key=place))


def image_captions(sample: Sample) -> list[str]:
    """The captions of a sample: the lines of its .txt member, or a list in its .json that begins with the text.

    Raises:
        UnusableSampleError: it has no caption.
    """
    texts = [text for text in captions.sample_captions({**sample.fields, "txt": sample.caption}) if text.strip()]
    if not texts:
        raise UnusableSampleError(sample, "it has no caption; write one in a .txt member, a caption per line")
    return texts


def locate(sample: Sample) -> str:
    """Name of the sample in messages."""
    return f"{sample.key} in {sample.shard}"


def _label_field(dataset: Dataset, sample: Sample) -> str:
    fields: dict[str, Any] = sample.fields
    wanted = [dataset.label] if dataset.label is not None else ["cls", "label"]
    for field in wanted:
        if field in fields:
            return field
    has = ", ".join(sorted(fields)) or "none"
    raise UnusableSampleError(
        sample,
        f"it has no label {' or '.join(map(repr, wanted))} (its fields: {has}); "
        "name the field that holds the label, or evaluate captions by the task 'retrieval'",
    )
