"""Symmetric InfoNCE between images and captions (CLIP, Radford et al. 2021, figure 3)."""

from pydantic import Field
from torch import Tensor

from mmssl.distributed import World
from mmssl.losses import correct_matches, info_nce
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
from mmssl.objectives._patch_masking import check_sees_patches, visible_pass, visible_patches
from mmssl.rng import RowRandom

ACCURACY_ROWS = 512
"""Accuracy in the batch is measured on this many images, so that it costs nothing beside the loss."""


class ContrastiveOptions(ObjectiveOptions):
    """Options of the contrastive objective."""

    mask_ratio: float = Field(0.0, ge=0, lt=1)
    """Part of the patches hidden from the vision tower (FLIP, Li et al. 2023): cheaper steps, larger batches. With the
    same ratio in `mae`, both read the same forward."""
    unmasked_finish: float = Field(0.1, ge=0, le=1)
    """With `mask_ratio`: the last part of the training, in which all patches are seen."""


class Contrastive(Objective):
    """Each image picks its caption among all of the global batch, and each caption its image."""

    Options = ContrastiveOptions
    batch_coupled = True

    def __init__(self, options: ContrastiveOptions, encoder: DualEncoder, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.options = options
        self.image = IMAGE
        if options.mask_ratio > 0:
            check_sees_patches("objectives.contrastive.mask_ratio", encoder)
        self.on_step_start(0.0)

    def on_step_start(self, progress: float) -> None:
        masked = self.options.mask_ratio > 0 and progress < 1 - self.options.unmasked_finish
        self.image = visible_pass(self.options.mask_ratio) if masked else IMAGE

    def sample_targets(self, inputs: Inputs, random: RowRandom, encoder: DualEncoder) -> dict[str, Tensor]:
        return {} if self.image == IMAGE else visible_patches(inputs, random, encoder, self.image)

    def required_passes(self) -> tuple[EncoderPass, ...]:
        return self.image, TEXT

    def predict(self, features: Features, inputs: Inputs, encoder: DualEncoder) -> Predictions:
        return {
            "image": encoder.project_image(features[self.image].pooled),
            "text": encoder.project_text(features[TEXT].pooled),
            "logit_scale": encoder.logit_scale,
        }

    def loss(self, predictions: Predictions, inputs: Inputs, world: World) -> Output:
        image, text, scale = (predictions[k] for k in ("image", "text", "logit_scale"))
        total = info_nce(image, text, scale, world=world)
        accuracy = matching_accuracy(image, text, world)
        return Output(total, {"accuracy": accuracy, "logit_scale": (scale.detach(), 1.0)})


def matching_accuracy(rows: Tensor, columns: Tensor, world: World) -> tuple[Tensor, int]:
    """How many of this process's first rows [n, D] lie nearest to their own column [n, D] of the global batch, and how
    many were asked."""
    rows = rows[:ACCURACY_ROWS]
    return correct_matches(rows, columns, world=world).sum(), len(rows)
