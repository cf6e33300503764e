"""From a pretrained model and a few labelled images to a classifier, and models between two models."""

from mmssl.apps.finetune.classifier import Classifier, load_classifier
from mmssl.apps.finetune.datasets import FineTuneData, gather
from mmssl.apps.finetune.interpolate import interpolate, interpolate_classifiers
from mmssl.apps.finetune.methods import METHODS, FineTuneSettings, Tuned, fine_tune

__all__ = [
    "METHODS",
    "Classifier",
    "FineTuneData",
    "FineTuneSettings",
    "Tuned",
    "fine_tune",
    "gather",
    "interpolate",
    "interpolate_classifiers",
    "load_classifier",
]
