"""Pairwise sigmoid loss between pictures and captions (SigLIP, Zhai et al. 2023)."""

import torch
from torch import nn

from mmssl.distributed.world import Processes
from mmssl.losses.siglip import INITIAL_BIAS, INITIAL_LOG_SCALE, siglip
from mmssl.models.dual_encoder import DualEncoder
from mmssl.objectives._base import (
    CLEAN_IMAGE,
    CLEAN_TEXT,
    Features,
    Forward,
    Inputs,
    Objective,
    ObjectiveOptions,
    Output,
    Predictions,
    Vocabulary,
)
from mmssl.objectives.contrastive import matching_accuracy


class Siglip(Objective):
    """Each picture and caption of the global batch decide by themselves whether they belong together.

    The temperature is the dual encoder's own, started at the paper's 1/10; the bias lives here.
    """

    coupled = True

    def __init__(self, options: ObjectiveOptions, encoder: DualEncoder, vocabulary: Vocabulary) -> None:
        super().__init__()
        nn.init.constant_(encoder.log_logit_scale, INITIAL_LOG_SCALE)
        self.bias = nn.Parameter(torch.tensor(INITIAL_BIAS))

    def forwards(self) -> tuple[Forward, ...]:
        return CLEAN_IMAGE, CLEAN_TEXT

    def predict(self, features: Features, inputs: Inputs, encoder: DualEncoder) -> Predictions:
        return {
            "image": encoder.project_image(features[CLEAN_IMAGE].pooled),
            "text": encoder.project_text(features[CLEAN_TEXT].pooled),
            "logit_scale": encoder.logit_scale,
            "bias": (self.bias + 0).reshape(
                ()
            ),  # a prediction of its own: the gradient found for it is handed back to the parameter
        }

    def loss(self, predictions: Predictions, inputs: Inputs, processes: Processes) -> Output:
        image, text, scale, bias = (predictions[k] for k in ("image", "text", "logit_scale", "bias"))
        total = siglip(image, text, scale, bias, ranks=processes)
        accuracy = matching_accuracy(image, text, processes)
        return Output(total, {"accuracy": accuracy, "logit_scale": (scale.detach(), 1.0)})
