"""Prediction of the clean image from a noisy one (denoising autoencoder, Vincent et al. 2008)."""

import torch
from pydantic import Field
from torch import Tensor

from mmssl.distributed import World
from mmssl.losses import prediction
from mmssl.models import DualEncoder, heads
from mmssl.objectives import base
from mmssl.objectives.mae import explained
from mmssl.rng import RowRandom

NOISY_IMAGE = base.EncoderPass("vision", "denoising.image")


class DenoisingOptions(base.ObjectiveOptions):
    """Options of denoising."""

    weight: float = Field(0.1, ge=0)
    """Factor of its loss in the total."""
    sigma: float = Field(64.0, gt=0)
    """Standard deviation of the Gaussian noise, on the scale of 0 to 255."""


class Denoising(base.Objective):
    """Mean squared error to the clean main view over all pixels. Each token predicts its square linearly."""

    Options = DenoisingOptions

    def __init__(self, options: DenoisingOptions, encoder: DualEncoder, vocabulary: base.Vocabulary) -> None:
        super().__init__()
        self.options = options
        self.decoder = heads.PlaceHead(*base.token_grid(encoder.vision, "denoising"), 3, encoder.vision.image_size)

    def sample_targets(self, inputs: base.Inputs, random: RowRandom, encoder: DualEncoder) -> dict[str, Tensor]:
        images = inputs["view.main"]
        return {"denoising.image": images + self.options.sigma * random.noise(*images.shape[1:])}

    def required_passes(self) -> tuple[base.EncoderPass, ...]:
        return (NOISY_IMAGE,)

    def predict(self, features: base.Features, inputs: base.Inputs, encoder: DualEncoder) -> base.Predictions:
        return {
            "image": self.decoder(features[NOISY_IMAGE].tokens),
            "target": encoder.vision.normalize(inputs["view.main"]),
        }

    def loss(self, predictions: base.Predictions, inputs: base.Inputs, world: World) -> base.Output:
        side = predictions["target"].shape[-1]
        predicted, target = (heads.patchify(predictions[name], side) for name in ("image", "target"))
        everywhere = torch.ones(target.shape[:2], dtype=torch.bool, device=target.device)
        total, _ = prediction.masked_patches(predicted, target, everywhere)
        return base.Output(total, {"explained": explained(total.detach(), target, everywhere)})

    def visualize(self, predictions: base.Predictions, inputs: base.Inputs, encoder: DualEncoder) -> Tensor:
        """The image, what the tower saw, and the reconstruction."""
        noisy = inputs["denoising.image"].round().clamp(0, 255).to(torch.uint8)
        return torch.stack([inputs["view.main"], noisy, encoder.vision.denormalize(predictions["image"])], 1)
