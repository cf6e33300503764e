"""Formats of exported models. A format is a module: `to_NAME.py` in this folder, or any other by its dotted path.

Such a module has:

- `LABEL`: the library that reads the files, for messages;
- `problems(model) -> list[str]`: properties of the model that the format cannot store, a few words each;
- `write(model, folder)`: write the files into an existing folder;
- `reader(model, folder) -> Encoder`: load the files with that library; `Reader` makes an encoder of two functions. What
  the format does not hold, such as the text tower, is the model's;
- `usage(folder) -> str`: Python code that loads the folder.

It may also have `write_classifier(classifier, folder)`, which writes the head of a fine-tuned classifier and returns a
function from the bytes of image files to probabilities, and `classifier_usage(folder)`. Without them the head becomes
head.safetensors and labels.json.
"""

import pkgutil
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from mmssl.errors import UserError
from mmssl.plugins import import_path

if TYPE_CHECKING:
    from mmssl.evaluate import encode
    from mmssl.inference import Model

_PREFIX = "to_"


class Format(Protocol):
    """The content of a format's module."""

    LABEL: str
    """The library that reads the files."""

    def problems(self, model: "Model") -> list[str]:
        """Properties of the model that the format cannot store, a few words each."""

    def write(self, model: "Model", folder: Path, **options: Any) -> None:
        """Write the files into an existing folder. Most formats take no options."""

    def reader(self, model: "Model", folder: Path) -> "encode.Encoder":
        """The files as an encoder, loaded with the library; what they do not hold is the model's."""

    def usage(self, folder: str) -> str:
        """Python code that loads the folder."""


def format_names() -> list[str]:
    """Names of the built-in formats."""
    modules = pkgutil.iter_modules([str(Path(__file__).parent)])
    return [module.name.removeprefix(_PREFIX) for module in modules if module.name.startswith(_PREFIX)]


def find_format(name: str) -> Format:
    """The format of a name, or of the dotted path of a module.

    Args:
        name: hyphens and underscores are the same.

    Raises:
        UserError: there is no such format or module, or the module lacks a function.
    """
    if "." in name:
        return _own_format(name)
    known = name.replace("-", "_")
    if known not in format_names():
        raise UserError(
            f"unknown export format {name!r}; choose from {', '.join(format_names())}, or give PACKAGE.MODULE"
        )
    return cast(Format, import_module(f"{__package__}.{_PREFIX}{known}"))


def _own_format(path: str) -> Format:
    module = import_path(path, "export format")
    missing = [name for name in ("LABEL", "problems", "write", "reader", "usage") if not hasattr(module, name)]
    if missing:
        raise UserError(f"export format {path} lacks {', '.join(missing)}; see docs/export.md")
    return cast(Format, module)
