"""What a task is given, and what a task is."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mmssl.distributed import World
from mmssl.evaluate.datasets import Dataset, training_split
from mmssl.evaluate.encode import EncodedImages, Encoder, Progress
from mmssl.evaluate.results import Metrics
from mmssl.evaluate.tasks import zero_shot
from mmssl.types import Sample


@dataclass(frozen=True)
class TaskContext:
    """One task on one data set, its images already encoded."""

    encoder: Encoder
    name: str
    dataset: Dataset
    embedded: EncodedImages
    training: Callable[[], EncodedImages]
    """The encoded images of the training split. Raises UserError where there is none."""
    embed: Callable[[Encoder, Iterable[Sample], str], EncodedImages]
    """Encode images of the data set, on which something was done, with an encoder; the text names what."""
    folder: Path | None
    """Where tables and plots go. None: nowhere."""
    draw: bool
    """Whether to draw images too."""
    batch_size: int
    logit_scale: float | None
    world: World
    progress: Progress | None

    def class_weights(self, names: Sequence[str]) -> Tensor:
        """One vector a class from the data set's prompts, [C, D]."""
        return zero_shot.class_weights(
            self.encoder,
            names,
            zero_shot.dataset_templates(self.dataset),
            batch_size=self.batch_size,
            world=self.world,
            progress=self.progress,
        )


def no_requirements(dataset: Dataset) -> None:
    """Every data set will do."""


def requires_training_split(dataset: Dataset) -> None:
    """Only a data set with a training split will do.

    Raises:
        UserError: it has none.
    """
    training_split(dataset)


@dataclass(frozen=True)
class Task:
    """A way to measure."""

    run: Callable[[TaskContext], Metrics]
    check: Callable[[Dataset, Sample], Any]
    """Raises UserError for a sample that lacks what the task needs, before it is encoded."""
    ready: Callable[[Dataset], None] = no_requirements
    """Raises UserError for a data set that lacks what the task needs, before it is read."""
