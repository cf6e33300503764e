"""Export of models to files that other libraries read, each checked with that library.

The names are imported on first use: the command line needs `format_names` only, without torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmssl.apps.export.exporter import Exported, export, measure, measure_classifier, push
    from mmssl.apps.export.formats import Format, find_format, format_names
    from mmssl.apps.export.onnx_files import shrink
    from mmssl.apps.export.reader import Reader
    from mmssl.apps.export.source import compare_with_source
    from mmssl.apps.export.to_onnx import OnnxEncoder

__all__ = [
    "Exported",
    "Format",
    "OnnxEncoder",
    "Reader",
    "compare_with_source",
    "export",
    "find_format",
    "format_names",
    "measure",
    "measure_classifier",
    "push",
    "shrink",
]

_MODULES = {
    **dict.fromkeys(("Format", "find_format", "format_names"), "formats"),
    "OnnxEncoder": "to_onnx",
    "Reader": "reader",
    "compare_with_source": "source",
    "shrink": "onnx_files",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_MODULES.get(name, 'exporter')}"), name)
    globals()[name] = value
    return value
