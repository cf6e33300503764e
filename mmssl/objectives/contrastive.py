"""Symmetric InfoNCE between images and captions (CLIP, Radford et al. 2021, figure 3)."""

import math

from pydantic import Field
from torch import Tensor

from mmssl.distributed import World
from mmssl.losses import correct_matches, info_nce
from mmssl.models import DualEncoder
from mmssl.objectives import base
from mmssl.objectives._patch_masking import check_sees_patches, visible_pass, visible_patches
from mmssl.rng import RowRandom

ACCURACY_ROWS = 512
"""Number of images for accuracy in the batch: its cost is negligible next to the loss."""


class ContrastiveOptions(base.ObjectiveOptions):
    """Options of the contrastive objective."""

    mask_ratio: float = Field(0.0, ge=0, lt=1)
    """Fraction of the patches hidden from the vision tower (FLIP, Li et al. 2023): cheaper steps, larger batches. With
    the same ratio in `mae`, both share one encoder pass."""
    unmasked_finish: float = Field(0.1, ge=0, le=1)
    """With `mask_ratio`: the last fraction of the training, in which the tower sees all patches."""


class Contrastive(base.Objective):
    """Match each image to its caption among all captions of the global batch, and each caption to its image."""

    Options = ContrastiveOptions
    batch_coupled = True
    is_reference = True

    def __init__(self, options: ContrastiveOptions, encoder: DualEncoder, vocabulary: base.Vocabulary) -> None:
        super().__init__()
        self.options = options
        self.image = base.IMAGE
        if options.mask_ratio > 0:
            check_sees_patches("objectives.contrastive.mask_ratio", encoder)
        self.on_step_start(0.0)

    def on_step_start(self, progress: float) -> None:
        masked = self.options.mask_ratio > 0 and progress < 1 - self.options.unmasked_finish
        self.image = visible_pass(self.options.mask_ratio) if masked else base.IMAGE

    def sample_targets(self, inputs: base.Inputs, random: RowRandom, encoder: DualEncoder) -> dict[str, Tensor]:
        return {} if self.image == base.IMAGE else visible_patches(inputs, random, encoder, self.image)

    @classmethod
    def chance_loss(cls, batch_size: int) -> float:
        return math.log(batch_size)

    def required_passes(self) -> tuple[base.EncoderPass, ...]:
        return self.image, base.TEXT

    def predict(self, features: base.Features, inputs: base.Inputs, encoder: DualEncoder) -> base.Predictions:
        return {
            "image": encoder.project_image(features[self.image].pooled),
            "text": encoder.project_text(features[base.TEXT].pooled),
            "logit_scale": encoder.logit_scale,
        }

    def loss(self, predictions: base.Predictions, inputs: base.Inputs, world: World) -> base.Output:
        image, text, scale = (predictions[k] for k in ("image", "text", "logit_scale"))
        total = info_nce(image, text, scale, world=world)
        accuracy = matching_accuracy(image, text, world)
        return base.Output(total, {"accuracy": accuracy, "logit_scale": (scale.detach(), 1.0)})


def matching_accuracy(rows: Tensor, columns: Tensor, world: World) -> tuple[Tensor, int]:
    """Number of this process's first rows [n, D] that are nearest to their own column [n, D] of the global batch, and
    the number of rows tested."""
    rows = rows[:ACCURACY_ROWS]
    return correct_matches(rows, columns, world=world).sum(), len(rows)
