"""Train image-text dual encoders with contrastive and self-supervised objectives, and use them."""

import os
from typing import TYPE_CHECKING, Any

# Threads of PyTorch's operations that wait must not spin: they would take the core that a busy program, or the loader,
# leaves to the thread they wait for. PyTorch reads this when it is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:
    from mmssl.api import MMSSL
    from mmssl.inference import Model, load

__all__ = ["MMSSL", "Model", "load"]

_HOMES = {"MMSSL": "api", "Model": "inference", "load": "inference"}


def __getattr__(name: str) -> Any:
    """The names above, imported when they are first asked for: `import mmssl` alone loads no library."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"mmssl.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
