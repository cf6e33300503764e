"""Training objectives, one module each; a module's name is the objective's name in the configuration."""

import importlib
import pkgutil
from collections.abc import Container

from mmssl.errors import UserError
from mmssl.objectives._base import Objective

_ROOMS = {"base", "mixer", "mixes", "visible"}
_REFERENCES = ("contrastive", "siglip")


def objective_names() -> list[str]:
    """Names of all objectives, found by looking at the modules of this package."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in _ROOMS)


def reference(names: Container[str]) -> str | None:
    """The objective among these that brings images and captions together; the others are measured against it."""
    return next((name for name in _REFERENCES if name in names), None)


def find_objective(name: str) -> type[Objective]:
    """The objective class of a name.

    Raises:
        UserError: there is none; lists those there are.
    """
    if name not in objective_names():
        raise UserError(f"unknown objective 'objectives.{name}'; there are: {', '.join(objective_names())}")
    module = importlib.import_module(f"{__name__}.{name}")
    found = [
        c
        for c in vars(module).values()
        if isinstance(c, type) and issubclass(c, Objective) and c.__module__ == module.__name__
    ]
    assert len(found) == 1, f"{module.__name__} must define exactly one objective"
    return found[0]
