"""Finding objectives by name."""

import importlib
from functools import cache

from mmssl.objectives._base import Objective
from mmssl.plugins import builtin_names, load_plugin


def objective_names() -> list[str]:
    """Names of the built-in objectives: the modules of this package without an underscore."""
    return builtin_names(importlib.import_module("mmssl.objectives"))


@cache
def find_objective(name: str) -> type[Objective]:
    """The class of an objective: a built-in one by its name, a user's own by a dotted path.

    Raises:
        UserError: no such objective.
    """
    # An abstract class is the right argument here.
    return load_plugin(name, importlib.import_module("mmssl.objectives"), Objective, "objective")  # type: ignore[type-abstract]
