"""From a pretrained model and a few labelled images to a classifier, and models between two models."""

from mmssl.apps.finetune import classifier, guard, methods, study
from mmssl.apps.finetune.classifier import Classifier, is_classifier, load_classifier
from mmssl.apps.finetune.datasets import FineTuneData, LabelOptions, gather
from mmssl.apps.finetune.methods import FineTuneSettings, fine_tune

__all__ = [
    "Classifier",
    "FineTuneData",
    "FineTuneSettings",
    "LabelOptions",
    "classifier",
    "fine_tune",
    "gather",
    "guard",
    "is_classifier",
    "load_classifier",
    "methods",
    "study",
]
