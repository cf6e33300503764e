"""Export of models to files that other libraries read, each checked with that library.

The names are imported on first use: the command line needs `format_names` only, without torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmssl.apps.export.exporter import TOLERANCE, Exported, export, push
    from mmssl.apps.export.formats import Format, find_format, format_names
    from mmssl.apps.export.onnx_files import halve, quantize
    from mmssl.apps.export.to_onnx import OnnxEncoder, write_classifier

__all__ = [
    "TOLERANCE",
    "Exported",
    "Format",
    "OnnxEncoder",
    "export",
    "find_format",
    "format_names",
    "halve",
    "push",
    "quantize",
    "write_classifier",
]

_MODULES = {
    **dict.fromkeys(("Format", "find_format", "format_names"), "formats"),
    **dict.fromkeys(("OnnxEncoder", "write_classifier"), "to_onnx"),
    **dict.fromkeys(("halve", "quantize"), "onnx_files"),
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_MODULES.get(name, 'exporter')}"), name)
    globals()[name] = value
    return value
