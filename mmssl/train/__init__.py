"""Training: the loop, the optimizer, checkpoints, loggers, and the cost of a step.

The door loads a module when one of its names is first used: `mmssl show` needs the cost of a step, not the loop.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmssl.train.checkpoint import list_checkpoints
    from mmssl.train.cost import StepCosts, predicted_cost, untrained_task
    from mmssl.train.optim import lr_factor
    from mmssl.train.setup import PACKED, is_available, resume_command
    from mmssl.train.trainer import Finished, train

_MODULES = {
    "Finished": "trainer",
    "PACKED": "setup",
    "StepCosts": "cost",
    "is_available": "setup",
    "list_checkpoints": "checkpoint",
    "lr_factor": "optim",
    "predicted_cost": "cost",
    "resume_command": "setup",
    "train": "trainer",
    "untrained_task": "cost",
}
__all__ = [
    "PACKED",
    "Finished",
    "StepCosts",
    "is_available",
    "list_checkpoints",
    "lr_factor",
    "predicted_cost",
    "resume_command",
    "train",
    "untrained_task",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
