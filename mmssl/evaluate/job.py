"""What a task is given, and what a task is."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmssl.distributed import Processes
from mmssl.evaluate.datasets import Dataset, training_split
from mmssl.evaluate.embed import Encoder, Pictures, Progress
from mmssl.evaluate.tables import Metrics
from mmssl.types import Sample


@dataclass(frozen=True)
class Job:
    """One task on one data set, its pictures already encoded."""

    encoder: Encoder
    name: str
    dataset: Dataset
    embedded: Pictures
    training: Callable[[], Pictures]
    """The encoded pictures of the training split. Raises UserError where there is none."""
    embed: Callable[[Encoder, Iterable[Sample], str], Pictures]
    """Encode pictures of the data set, on which something was done, with an encoder; the text names what."""
    folder: Path | None
    """Where tables and pictures go. None: nowhere."""
    draw: bool
    """Whether to draw pictures too."""
    batch_size: int
    logit_scale: float | None
    processes: Processes
    progress: Progress | None


def anything(dataset: Dataset) -> None:
    """Every data set will do."""


def with_training(dataset: Dataset) -> None:
    """Only a data set with a training split will do.

    Raises:
        UserError: it has none.
    """
    training_split(dataset)


@dataclass(frozen=True)
class Task:
    """A way to measure."""

    run: Callable[[Job], Metrics]
    check: Callable[[Dataset, Sample], Any]
    """Raises UserError for a sample that lacks what the task needs, before it is encoded."""
    ready: Callable[[Dataset], None] = anything
    """Raises UserError for a data set that lacks what the task needs, before it is read."""
