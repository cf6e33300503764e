"""Plug-ins by name: a module of one of our own packages, or a dotted path to a user's class."""

import importlib
import pkgutil
import sys
from types import ModuleType
from typing import TypeVar

from mmssl.errors import UserError, one_line

T = TypeVar("T")


def builtin_names(package: ModuleType) -> list[str]:
    """The modules of a package, in name order; those with an underscore in front are no plug-ins. Imports none."""
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))


def load_plugin(name: str, package: ModuleType, base: type[T], kind: str) -> type[T]:
    """The subclass of `base` that a name stands for.

    Args:
        name: a module of `package`; or a path, `my_lab.tasks:Counting`, or `my_lab.counting` for a module with one
            such class. The current folder is searched too.
        kind: the word for it in messages, for example `evaluation task`.
    Raises:
        UserError: the name is unknown, or the module has no such class.
    """
    known = builtin_names(package)
    path, colon, attribute = name.partition(":")
    if name in known:
        path = f"{package.__name__}.{name}"
    elif not colon and "." not in path:
        raise UserError(
            f"unknown {kind} {name!r}; choose from {', '.join(known)}, or give a path such as my_module:MyClass"
        )
    module = import_path(path, kind)
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, base) and value.__module__ == module.__name__
    ]
    if colon:
        found = [value for value in [getattr(module, attribute, None)] if isinstance(value, type)]
        found = [value for value in found if issubclass(value, base)]
        if not found:
            raise UserError(f"{kind} {name!r}: {path} has no class {attribute!r} derived from {base.__name__}")
    if len(found) != 1:
        raise UserError(
            f"{kind} {name!r}: {path} defines {len(found)} classes derived from {base.__name__}; "
            f"name one, as {path}:MyClass"
        )
    return found[0]


def import_path(path: str, kind: str) -> ModuleType:
    """Import a module; the current folder is searched too.

    Raises:
        UserError: there is no such module, or it raised an error.
    """
    # A console script does not search the current folder by itself.
    added = "" not in sys.path
    if added:
        sys.path.append("")
    try:
        return importlib.import_module(path)
    except Exception as error:  # a user's module can raise anything
        if isinstance(error, ModuleNotFoundError) and error.name and f"{path}.".startswith(f"{error.name}."):
            raise UserError(
                f"{kind} {path!r}: there is no module {error.name!r} in this folder or in PYTHONPATH"
            ) from None
        raise UserError(f"{kind} {path!r}: cannot import {path}: {type(error).__name__}: {one_line(error)}") from error
    finally:
        if added:
            sys.path.remove("")
