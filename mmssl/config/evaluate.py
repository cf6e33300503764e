"""`evaluate`: datasets and tasks."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from mmssl.config.base import ConfigBase


def _separated(value: Any) -> Any:
    """A list from one word, comma-separated words, or a list."""
    return [word.strip() for word in value.split(",")] if isinstance(value, str) else value


Words = BeforeValidator(_separated)


class SuiteConfig(ConfigBase):
    """One dataset to evaluate on during and after training."""

    data: str
    """Folder in CLIP_benchmark's WebDataset layout, or a pattern of paired shards."""
    task: Annotated[list[str], Words, Field(min_length=1)] = ["zero_shot"]
    """One task or several, by name or by the path of your own (`my_module:MyTask`)."""
    slice_by: Annotated[list[str], Words] = []
    """Metadata fields (entries of the JSON member) to group the accuracy of classifications by."""


class EvaluateConfig(ConfigBase):
    """Evaluation during and after training."""

    suites: dict[str, SuiteConfig] = {}
    """Name -> dataset and task."""
    every: int | None = Field(None, ge=1)
    """Steps between evaluations. Default: at the end only."""
    best: str | None = None
    """The metric that picks the best checkpoint, for example `unseen_style/zero_shot/acc1`. Default: that of
    `train.early_stopping`, else the main metric of the first suite."""
    batch_size: int = Field(256, ge=1)
    """Images or captions per forward pass."""
    bad_samples: float = Field(0.1, ge=0, le=1)
    """Largest fraction of a dataset's samples that an evaluation may leave out because they cannot be used; of fewer
    than 100 samples, it is that of 100. An evaluation beyond the limit fails, and the training goes on."""
