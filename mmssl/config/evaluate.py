"""`evaluate`: data sets and tasks."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from mmssl.config.base import ConfigBase


def _separated(value: Any) -> Any:
    """One word, words with commas between them, or a list."""
    return [word.strip() for word in value.split(",")] if isinstance(value, str) else value


Words = BeforeValidator(_separated)


class SuiteConfig(ConfigBase):
    """One data set to evaluate on while training and at the end."""

    data: str
    """Folder in CLIP_benchmark's WebDataset layout, or a pattern of paired shards."""
    task: Annotated[list[str], Words, Field(min_length=1)] = ["zero_shot"]
    """One task or several, by name or by the path of your own (`my_module:MyTask`)."""
    slice_by: Annotated[list[str], Words] = []
    """Metadata fields (entries of the JSON member) to break the accuracies of classifications down by."""


class EvaluateConfig(ConfigBase):
    """Evaluation in and after training."""

    suites: dict[str, SuiteConfig] = {}
    """Name -> data set and task."""
    every: int | None = Field(None, ge=1)
    """Steps between evaluations. Default: at the end only."""
    best: str | None = None
    """The metric that picks the best checkpoint, for example `unseen_style/zero_shot/acc1`. Default: the
    first suite's main one."""
    batch_size: int = Field(256, ge=1)
    """Images or captions per forward pass."""
