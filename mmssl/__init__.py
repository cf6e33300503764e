"""Train image-text dual encoders with contrastive and self-supervised objectives, and use them."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmssl.api import MMSSL
    from mmssl.inference.model import Model, load

__all__ = ["MMSSL", "Model", "load"]

_ROOMS = {"MMSSL": "api", "Model": "inference.model", "load": "inference.model"}


def __getattr__(name: str) -> Any:
    """The names above, imported when they are first asked for: `import mmssl` alone loads no library."""
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"mmssl.{_ROOMS[name]}"), name)
    globals()[name] = value
    return value
