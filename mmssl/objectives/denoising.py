"""Predict the clean image from a noisy one (denoising autoencoder, Vincent et al. 2008)."""

import torch
from pydantic import Field
from torch import Tensor

from mmssl.distributed import World
from mmssl.losses import masked_patches
from mmssl.models.dual_encoder import DualEncoder
from mmssl.models.heads import PlaceHead, patchify
from mmssl.objectives._base import (
    EncoderPass,
    Features,
    Inputs,
    Objective,
    ObjectiveOptions,
    Output,
    Predictions,
    Vocabulary,
    token_grid,
)
from mmssl.objectives.mae import explained
from mmssl.rng import RowRandom

NOISY_IMAGE = EncoderPass("vision", "denoising.image")


class DenoisingOptions(ObjectiveOptions):
    """Options of denoising."""

    weight: float = Field(0.1, ge=0)
    """Factor of its loss in the total."""
    sigma: float = Field(64.0, gt=0)
    """Standard deviation of the Gaussian noise, in steps of a byte (0 to 255)."""


class Denoising(Objective):
    """Mean squared error to the clean main view, over all pixels, each place predicting its square linearly."""

    Options = DenoisingOptions

    def __init__(self, options: DenoisingOptions, encoder: DualEncoder, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.options = options
        self.decoder = PlaceHead(*token_grid(encoder.vision, "denoising"), 3, encoder.vision.image_size)

    def sample_targets(self, inputs: Inputs, random: RowRandom, encoder: DualEncoder) -> dict[str, Tensor]:
        images = inputs["view.main"]
        return {"denoising.image": images + self.options.sigma * random.noise(*images.shape[1:])}

    def required_passes(self) -> tuple[EncoderPass, ...]:
        return (NOISY_IMAGE,)

    def predict(self, features: Features, inputs: Inputs, encoder: DualEncoder) -> Predictions:
        return {
            "image": self.decoder(features[NOISY_IMAGE].tokens),
            "target": encoder.vision.normalize(inputs["view.main"]),
        }

    def loss(self, predictions: Predictions, inputs: Inputs, world: World) -> Output:
        side = predictions["target"].shape[-1]
        predicted, target = (patchify(predictions[name], side) for name in ("image", "target"))
        everywhere = torch.ones(target.shape[:2], dtype=torch.bool, device=target.device)
        total, _ = masked_patches(predicted, target, everywhere)
        return Output(total, {"explained": explained(total.detach(), target, everywhere)})

    def visualize(self, predictions: Predictions, inputs: Inputs, encoder: DualEncoder) -> Tensor:
        """The image, what the tower saw, and the reconstruction."""
        noisy = inputs["denoising.image"].round().clamp(0, 255).to(torch.uint8)
        return torch.stack([inputs["view.main"], noisy, encoder.vision.denormalize(predictions["image"])], 1)
