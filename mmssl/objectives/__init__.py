"""Training objectives and their mixes. A module without an underscore is a built-in objective of the same name.

An objective of your own derives from `Objective` and is named by its dotted path (docs/objectives.md).
"""

from mmssl.objectives import _base as base
from mmssl.objectives import _mix_spec as mix_spec
from mmssl.objectives import _mixing as mixing
from mmssl.objectives._base import IMAGE, TEXT, EncoderPass, Objective, ObjectiveOptions, Output
from mmssl.objectives._mixing import TrainingTask
from mmssl.objectives._registry import find_objective, objective_names

__all__ = [
    "IMAGE",
    "TEXT",
    "EncoderPass",
    "Objective",
    "ObjectiveOptions",
    "Output",
    "TrainingTask",
    "base",
    "find_objective",
    "mix_spec",
    "mixing",
    "objective_names",
]
