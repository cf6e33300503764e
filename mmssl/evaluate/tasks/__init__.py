"""Evaluation tasks, one per module: measurement, requirements, tables and plots.

A task of your own is a class derived from `Task`, named by its path: `my_lab.tasks:Counting`.
"""

import sys
from functools import cache
from typing import TYPE_CHECKING

from mmssl.plugins import builtin_names, load_plugin

if TYPE_CHECKING:
    from mmssl.evaluate.task import Task

__all__ = ["direction", "find_task", "main_metrics", "paired_tasks", "task_label", "task_names"]

_LOWER_IS_BETTER = ("calibration_error", "median_rank", "bad_samples", "real_gaps", "fpr95_prompts", "fpr95_images")
"""Endings of metric names for which lower is better."""


def direction(metric: str) -> int:
    """1 where higher is better, else -1."""
    return -1 if metric.endswith(_LOWER_IS_BETTER) else 1


def task_names() -> list[str]:
    """The names of the built-in tasks, without importing any."""
    return builtin_names(sys.modules[__name__])


@cache
def find_task(name: str) -> "Task":
    """The task of a name, or of a path to a class or to a module with one task.

    Raises:
        UserError: the task does not exist.
    """
    from mmssl.evaluate.task import Task

    return load_plugin(name, sys.modules[__name__], Task, "task")()  # type: ignore[type-abstract]


def task_label(name: str) -> str:
    """Short description of a built-in task; the name of any other."""
    return find_task(name).label if name in task_names() else name.replace("_", " ")


def main_metrics(name: str) -> tuple[str, ...]:
    """Main metrics of a built-in task, also of its first dimensions (`TASK@D`); empty for any other."""
    name = name.partition("@")[0]
    return find_task(name).main_metrics if name in task_names() else ()


def paired_tasks() -> list[str]:
    """Built-in tasks that can compare two models sample by sample."""
    return [name for name in task_names() if find_task(name).paired]
