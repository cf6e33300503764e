"""Inference with a trained model: loading it, encoding images and texts, and classifying images by labels."""

from typing import TYPE_CHECKING, Any

from mmssl.inference.model import ImageInput, Model, as_image_list, load

if TYPE_CHECKING:
    from mmssl.inference.classify import (
        Classify,
        Prediction,
        ZeroShotClassifier,
        label_probabilities,
        list_images,
        predict,
        zero_shot,
    )

__all__ = [
    "Classify",
    "ImageInput",
    "Model",
    "Prediction",
    "ZeroShotClassifier",
    "as_image_list",
    "label_probabilities",
    "list_images",
    "load",
    "predict",
    "zero_shot",
]


def __getattr__(name: str) -> Any:
    """Import `classify` when one of its names is used: training needs models only, without the evaluation tasks."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mmssl.inference import classify

    return getattr(classify, name)
