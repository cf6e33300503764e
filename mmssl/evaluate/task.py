"""The contract of an evaluation task: its declarations, and the context of a run."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mmssl.distributed import World
from mmssl.errors import UserError
from mmssl.evaluate.datasets import Dataset, class_templates
from mmssl.evaluate.encode import EncodedImages, Encoder, Progress, class_weights, encode_texts
from mmssl.evaluate.labels import NO_NAMES, class_indices
from mmssl.files import write_csv
from mmssl.stats import Interval
from mmssl.types import Sample

Metrics = dict[str, Any]
"""The results of one evaluation by name: numbers, and below `intervals` the 95 % interval of each that has one."""

DRAWS = "draws.csv"
"""Table of a task that draws its training samples: one row per draw, one column per metric."""


@dataclass(frozen=True)
class TaskContext:
    """One task on one dataset whose images are encoded."""

    encoder: Encoder
    name: str
    """The dataset's name in the results."""
    dataset: Dataset
    images: EncodedImages
    training_images: Callable[[], EncodedImages]
    """Encode the training split. Raises UserError if the dataset has none."""
    encode_variant: Callable[[Encoder, Iterable[Sample], str], EncodedImages]
    """Encode changed images of the dataset with an encoder; the text names the change, for the cache."""
    folder: Path | None
    """Folder for tables and plots; it may not exist yet. None: write nothing."""
    draw: bool
    """Draw plots too."""
    batch_size: int
    logit_scale: float | None
    """The model's factor from similarities to logits, if it has one."""
    logit_curve: float
    """Of calibrated logits, else 0."""
    world: World
    progress: Progress | None
    text_encoder: Encoder | None = None
    """The encoder of texts where it is another one, as for the first dimensions only."""

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors of texts, [N, D]."""
        encoder = self.text_encoder or self.encoder
        return encode_texts(encoder, texts, batch_size=self.batch_size, world=self.world, progress=self.progress)

    def class_weights(self, names: Sequence[str]) -> Tensor:
        """One unit vector per class, from the dataset's prompts, [C, D].

        Raises:
            UserError: the classes are numbers, which say nothing to a text tower.
        """
        if self.dataset.classnames is None and all(name.lstrip("-").isdecimal() for name in names):
            raise UserError(NO_NAMES.format(place=f"of {self.name}, which are numbers ({', '.join(names[:3])} ...)"))
        return class_weights(
            self.text_encoder or self.encoder,
            names,
            class_templates(self.dataset),
            batch_size=self.batch_size,
            world=self.world,
            progress=self.progress,
        )

    def labelled_training(self) -> tuple[EncodedImages, Tensor, Tensor, tuple[str, ...]]:
        """The training images, their labels, the labels of the images to evaluate, and the class names of both.

        Labels are int64.
        """
        train = self.training_images()
        names, both = class_indices(self.dataset, [*train.samples, *self.images.samples])
        return train, both[: len(train.samples)], both[len(train.samples) :], names


class Task(ABC):
    """A way to measure a model on a dataset. One instance serves all datasets."""

    name: ClassVar[str]
    """Name in results and folders."""
    label: ClassVar[str]
    """Short description in words."""
    description: ClassVar[str]
    """One sentence about the measurement."""
    main_metrics: ClassVar[tuple[str, ...]] = ()
    """Main metrics of an evaluation, the most important first."""
    paired: ClassVar[bool] = False
    """True if the metrics are means over samples and a table holds the outcome of each sample. Then two models can be
    compared sample by sample."""

    def ready(self, dataset: Dataset) -> None:  # noqa: B027 - most tasks need nothing
        """Raise UserError for an unsuitable dataset, before it is read."""

    def check(self, dataset: Dataset, sample: Sample) -> None:  # noqa: B027
        """Raise UserError for an unsuitable sample, before it is encoded."""

    @abstractmethod
    def run(self, context: TaskContext) -> Metrics:
        """Measure, and write tables and plots to `context.folder` unless it is None."""


def list_intervals(intervals: Mapping[str, Interval]) -> Metrics:
    """Intervals as entries of the metrics, in the form that JSON reads back."""
    return {"intervals": {name: list(interval) for name, interval in intervals.items()}}


def list_baselines(baselines: Mapping[str, Mapping[str, float]]) -> Metrics:
    """Baselines as entries of the metrics: metric -> `majority` and `chance` -> value."""
    return {"baselines": {name: dict(found) for name, found in baselines.items()}} if baselines else {}


def write_outcomes(context: TaskContext, samples: Sequence[Sample], outcomes: Mapping[str, NDArray[Any]]) -> None:
    """Write outcomes.csv: one row per sample and one column per metric, which is the mean of its column.

    Args:
        outcomes: metric -> value of each sample, [N].
    """
    if context.folder is not None:
        values = [column.astype(np.float64).tolist() for column in outcomes.values()]
        rows = ((s.shard, s.key, *row) for s, *row in zip(samples, *values, strict=True))
        write_csv(context.folder / "outcomes.csv", ("shard", "key", *outcomes), rows)
