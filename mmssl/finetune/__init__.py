"""From a pretrained model and a few labelled pictures to a classifier, and models between two models."""

from mmssl.finetune.classifier import Classifier, load_classifier
from mmssl.finetune.interpolate import interpolate, interpolate_classifiers
from mmssl.finetune.labelled import Problem, gather
from mmssl.finetune.methods import METHODS, Settings, Tuned, fine_tune

__all__ = [
    "METHODS",
    "Classifier",
    "Problem",
    "Settings",
    "Tuned",
    "fine_tune",
    "gather",
    "interpolate",
    "interpolate_classifiers",
    "load_classifier",
]
