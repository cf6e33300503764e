"""Inference with a trained model: loading it, encoding images and texts, and classifying images by labels."""

from mmssl.inference.classify import (
    Classify,
    Prediction,
    ZeroShotClassifier,
    label_probabilities,
    list_images,
    predict,
    zero_shot,
)
from mmssl.inference.model import ImageInput, Model, as_image_list, load

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
