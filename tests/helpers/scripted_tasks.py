"""Evaluation tasks that give the values they are told, one per evaluation."""

from collections.abc import Callable
from typing import ClassVar

from mmssl.evaluate import Metrics, Task, TaskContext

SCRIPTED, GUARDED = f"{__name__}:Scripted", f"{__name__}:Guarded"
"""Paths of the tasks, for a configuration."""


class Scripted(Task):
    """Gives the next of its values; without one it fails."""

    name = "scripted"
    label = "scripted"
    description = "Gives the values it is told."
    values: ClassVar[list[float]] = []
    meanwhile: ClassVar[Callable[[], None] | None] = None
    """Called before the last value is given."""

    def run(self, context: TaskContext) -> Metrics:
        """The next value."""
        own = type(self)
        if own.meanwhile is not None and len(own.values) == 1:
            own.meanwhile()
        return {"value": own.values.pop(0)}


class Guarded(Scripted):
    """A second one, with values of its own."""

    name = "guarded"
    label = "guarded"
    values: ClassVar[list[float]] = []
