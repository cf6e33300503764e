"""Pairwise sigmoid loss between images and captions (SigLIP, Zhai et al. 2023)."""

import torch
from torch import nn

from mmssl.distributed import World
from mmssl.losses import SIGLIP_BIAS, SIGLIP_LOG_SCALE, siglip
from mmssl.models.dual_encoder import DualEncoder
from mmssl.objectives._base import (
    IMAGE,
    TEXT,
    EncoderPass,
    Features,
    Inputs,
    Objective,
    ObjectiveOptions,
    Output,
    Predictions,
    Vocabulary,
)
from mmssl.objectives.contrastive import matching_accuracy


class Siglip(Objective):
    """Each image and caption of the global batch decide by themselves whether they belong together.

    The temperature is the dual encoder's own, started at the paper's 1/10; the bias lives here.
    """

    batch_coupled = True

    def __init__(self, options: ObjectiveOptions, encoder: DualEncoder, vocabulary: Vocabulary) -> None:
        super().__init__()
        nn.init.constant_(encoder.log_logit_scale, SIGLIP_LOG_SCALE)
        self.bias = nn.Parameter(torch.tensor(SIGLIP_BIAS))

    def required_passes(self) -> tuple[EncoderPass, ...]:
        return IMAGE, TEXT

    def predict(self, features: Features, inputs: Inputs, encoder: DualEncoder) -> Predictions:
        return {
            "image": encoder.project_image(features[IMAGE].pooled),
            "text": encoder.project_text(features[TEXT].pooled),
            "logit_scale": encoder.logit_scale,
            "bias": (self.bias + 0).reshape(
                ()
            ),  # a prediction of its own: the gradient found for it is handed back to the parameter
        }

    def loss(self, predictions: Predictions, inputs: Inputs, world: World) -> Output:
        image, text, scale, bias = (predictions[k] for k in ("image", "text", "logit_scale", "bias"))
        total = siglip(image, text, scale, bias, world=world)
        accuracy = matching_accuracy(image, text, world)
        return Output(total, {"accuracy": accuracy, "logit_scale": (scale.detach(), 1.0)})
