"""Evaluation: features of datasets, tasks that measure a model on them, and comparisons of two models.

`suite.run` evaluates; a task of your own derives from `Task`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmssl.evaluate import compare, console, datasets, encode, feature_cache, labels, prompts, suite
    from mmssl.evaluate.datasets import open_dataset
    from mmssl.evaluate.task import Metrics, Task, TaskContext

__all__ = [
    "Metrics",
    "Task",
    "TaskContext",
    "compare",
    "console",
    "datasets",
    "encode",
    "feature_cache",
    "labels",
    "open_dataset",
    "prompts",
    "suite",
]


def __getattr__(name: str) -> Any:
    """Import on demand: the names of tasks (`mmssl eval --help`) do not need torch."""
    from importlib import import_module

    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "open_dataset" or name[0].isupper():
        return getattr(import_module(f"{__name__}.{'datasets' if name == 'open_dataset' else 'task'}"), name)
    return import_module(f"{__name__}.{name}")
