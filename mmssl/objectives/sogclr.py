"""Contrast of images and captions with all of the data, by moving averages of each sample (SogCLR, Yuan et al. 2022).

Small batches give InfoNCE a biased gradient: its sum over negatives is that of the batch. Here each sample keeps an
estimate of that sum over the whole data, which its later batches refine (FastCLIP, Wei et al. 2024).
"""

import math

import torch
from pydantic import Field
from torch import Tensor

from mmssl.distributed import World
from mmssl.losses import UNSEEN, global_contrastive
from mmssl.models import DualEncoder
from mmssl.objectives import base
from mmssl.objectives._pairs import matching_accuracy


class SogclrOptions(base.ObjectiveOptions):
    """Options of the global contrastive loss."""

    gamma: float = Field(0.9, gt=0, le=1)
    """Weight of the newest batch in a sample's moving average. With 1 a batch counts alone."""
    gamma_end: float | None = Field(None, gt=0, le=1)
    """Value that `gamma` falls to by the end of the training, as a cosine (FastCLIP: from 1 to 0.2). Default: it stays.
    """
    eps: float = Field(1e-14, ge=0)
    """Number added to the average before its logarithm."""


class Sogclr(base.Objective):
    """Match each image to its caption among all captions of the data, and each caption to its image.

    The averages, two numbers per sample, are part of checkpoints.
    """

    Options = SogclrOptions
    batch_coupled = True
    is_reference = True
    keeps_samples = True

    def __init__(self, options: SogclrOptions, encoder: DualEncoder, vocabulary: base.Vocabulary) -> None:
        super().__init__()
        self.options = options
        self.gamma = options.gamma
        # Logarithms of the averages of image and caption of each sample; none before the data is known.
        self.register_buffer("estimates", torch.empty(0, 2))
        self._newest: Tensor | None = None

    def on_data(self, samples: int) -> None:
        self.register_buffer("estimates", self.get_buffer("estimates").new_full((samples, 2), UNSEEN))

    def on_step_start(self, progress: float) -> None:
        start, end = self.options.gamma, self.options.gamma_end
        self.gamma = start if end is None else end + (start - end) * (1 + math.cos(math.pi * progress)) / 2

    @classmethod
    def chance_loss(cls, batch_size: int) -> float:
        # Equal logits make every average 1.
        return 0.0

    def required_passes(self) -> tuple[base.EncoderPass, ...]:
        return (base.IMAGE, base.TEXT)

    def predict(self, features: base.Features, inputs: base.Inputs, encoder: DualEncoder) -> base.Predictions:
        return {
            "image": encoder.project_image(features[base.IMAGE].pooled),
            "text": encoder.project_text(features[base.TEXT].pooled),
            "logit_scale": encoder.logit_scale,
        }

    def loss(self, predictions: base.Predictions, inputs: base.Inputs, world: World) -> base.Output:
        image, text, scale = predictions["image"], predictions["text"], predictions["logit_scale"]
        table, ids = self.get_buffer("estimates"), inputs["ids"]
        known = table[ids] if len(table) > 0 else table.new_full((len(ids), 2), UNSEEN)
        loss, newest = global_contrastive(
            image, text, scale, known, gamma=self.gamma, eps=self.options.eps, world=world
        )
        if self.training:  # and not while gradients are measured on a part of the batch
            self._newest = newest
        accuracy = matching_accuracy(image, text, world)
        return base.Output(loss, {"accuracy": accuracy, "logit_scale": (scale.detach(), 1.0)})

    def on_step_end(self, inputs: base.Inputs, world: World) -> None:
        table = self.get_buffer("estimates")
        if len(table) == 0:
            return
        assert self._newest is not None
        ids, newest = world.gather(inputs["ids"])[0], world.gather(self._newest.to(table.dtype))[0]
        # A stand-in for a bad sample may come twice. The larger of its averages counts, in any order of the ranks.
        table.scatter_reduce_(0, ids[:, None].expand(-1, 2), newest, "amax", include_self=False)
