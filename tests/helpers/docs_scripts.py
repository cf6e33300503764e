"""Scripts of the repository as modules."""

import importlib.util
import sys
from typing import Any

from tests.helpers.docs_blocks import ROOT


def load_script(name: str) -> Any:
    """The module of scripts/NAME.py, loaded once."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]
