"""Pairwise sigmoid loss between images and captions (SigLIP, Zhai et al. 2023)."""

import math

import torch
from torch import Tensor, nn

from mmssl.distributed import World
from mmssl.losses import SIGLIP_BIAS, SIGLIP_LOG_SCALE, siglip
from mmssl.models import DualEncoder
from mmssl.objectives import base
from mmssl.objectives._pairs import PairObjective, PairOptions, mean


class Siglip(PairObjective):
    """Classify each image-caption pair of the global batch as matching or not.

    The temperature belongs to the dual encoder and starts at the paper's 1/10; the bias belongs to the objective.
    """

    Options = PairOptions
    options: PairOptions

    def __init__(self, options: PairOptions, encoder: DualEncoder, vocabulary: base.Vocabulary) -> None:
        super().__init__("siglip", options, encoder)
        nn.init.constant_(encoder.log_logit_scale, SIGLIP_LOG_SCALE)
        self.bias = nn.Parameter(torch.tensor(SIGLIP_BIAS))

    @classmethod
    def chance_loss(cls, batch_size: int) -> float:
        # Equal logits cost -ln p - (n - 1) ln(1 - p) per image, which is lowest at p = 1 / n.
        n = batch_size
        return math.log(n) + ((n - 1) * math.log(n / (n - 1)) if n > 1 else 0.0)

    def chance_with_groups(self, of_images: Tensor, of_texts: Tensor, right: Tensor, world: World) -> Tensor:
        found, all_pairs = world.sum(torch.stack([right.sum(), of_images.sum()])).float()
        wrong = all_pairs - found
        # As above with p = found / all_pairs; 0 * log(0) counts as 0.
        chance: Tensor = (all_pairs / found).log() + torch.special.xlogy(wrong, all_pairs / wrong.clamp(min=1)) / found
        return chance

    def predict(self, features: base.Features, inputs: base.Inputs, encoder: DualEncoder) -> base.Predictions:
        # A new tensor: cached gradients of predictions then reach the parameter.
        return super().predict(features, inputs, encoder) | {"bias": (self.bias + 0).reshape(())}

    def loss(self, predictions: base.Predictions, inputs: base.Inputs, world: World) -> base.Output:
        image, text, groups = self.pairs(predictions, inputs)
        scale, bias = predictions["logit_scale"], predictions["bias"]
        form = self.options.form
        losses = [
            siglip(*pair, scale, bias, world=world, form=form, groups=groups) for pair in self.prefixes(image, text)
        ]
        return base.Output(mean(losses), self.metrics(image, text, scale, world, groups))
