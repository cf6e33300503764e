"""Symmetric InfoNCE between images and captions (CLIP, Radford et al. 2021, figure 3)."""

import math

from pydantic import Field, model_validator
from torch import Tensor

from mmssl.distributed import World
from mmssl.losses import info_nce
from mmssl.models import DualEncoder
from mmssl.objectives import base
from mmssl.objectives._pairs import PairObjective, PairOptions, mean
from mmssl.objectives._patch_masking import check_sees_patches, visible_pass, visible_patches
from mmssl.rng import RowRandom


class ContrastiveOptions(PairOptions):
    """Options of the contrastive objective."""

    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Part of the target that is spread evenly over all captions (or images) of the batch, as in F.cross_entropy."""
    mask_ratio: float = Field(0.0, ge=0, lt=1)
    """Fraction of the patches hidden from the vision tower (FLIP, Li et al. 2023): cheaper steps, larger batches. With
    the same ratio in `mae`, both share one encoder pass."""
    unmasked_finish: float = Field(0.1, ge=0, le=1)
    """With `mask_ratio`: the last fraction of the training, in which the tower sees all patches."""

    @model_validator(mode="after")
    def _check(self) -> "ContrastiveOptions":
        if self.label_smoothing > 0 and self.same == "mask":
            raise ValueError(
                "objectives.contrastive: label_smoothing spreads over all pairs, and same=mask leaves some out; set one"
            )
        return self


class Contrastive(PairObjective):
    """Match each image to its caption among all captions of the global batch, and each caption to its image."""

    Options = ContrastiveOptions
    options: ContrastiveOptions

    def __init__(self, options: ContrastiveOptions, encoder: DualEncoder, vocabulary: base.Vocabulary) -> None:
        super().__init__("contrastive", options, encoder)
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

    def chance_with_groups(self, of_images: Tensor, of_texts: Tensor, right: Tensor, world: World) -> Tensor:
        return (of_images.float().log().mean() + of_texts.float().log().mean()) / 2

    def loss(self, predictions: base.Predictions, inputs: base.Inputs, world: World) -> base.Output:
        image, text, groups = self.pairs(predictions, inputs)
        scale, options = predictions["logit_scale"], self.options
        losses = [
            info_nce(
                *prefix, scale, world=world, form=options.form, groups=groups, label_smoothing=options.label_smoothing
            )
            for prefix in self.prefixes(image, text)
        ]
        return base.Output(mean(losses), self.metrics(image, text, scale, world, groups))
