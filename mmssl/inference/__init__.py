"""Inference with a trained model: loading it, encoding images and texts, and classifying images by labels."""

from typing import TYPE_CHECKING, Any

from mmssl.inference import probabilities
from mmssl.inference.images import ImageInput, as_image_list
from mmssl.inference.model import Model, load
from mmssl.inference.zero_shot import Classify, zero_shot

if TYPE_CHECKING:
    from mmssl.inference import neighbours, stored
    from mmssl.inference.classify import Prediction, list_images, predict

__all__ = [
    "Classify",
    "ImageInput",
    "Model",
    "Prediction",
    "as_image_list",
    "list_images",
    "load",
    "neighbours",
    "predict",
    "probabilities",
    "stored",
    "zero_shot",
]


def __getattr__(name: str) -> Any:
    """Import `neighbours` and `stored`, and `classify` for its names, when they are used: few need them."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    if name in ("neighbours", "stored"):
        return import_module(f"mmssl.inference.{name}")
    return getattr(import_module("mmssl.inference.classify"), name)
