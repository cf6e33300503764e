"""Variational autoencoder: the image from a small random vector of it (Kingma and Welling 2014)."""

import torch
from pydantic import Field
from torch import Tensor, nn

from mmssl.distributed import World
from mmssl.losses import prediction
from mmssl.models import DualEncoder, heads
from mmssl.objectives import base
from mmssl.objectives.mae import explained
from mmssl.rng import RowRandom

WIDTH = 64
"""Width of the decoder's tokens."""
PLACES = 8
"""The decoder's tokens per side."""
BOUND = 10.0
"""Largest size of a log variance: its exponential stays finite in half formats."""


class VaeOptions(base.ObjectiveOptions):
    """Options of the variational autoencoder."""

    weight: float = Field(0.1, ge=0)
    """Factor of its loss in the total."""
    latent: int = Field(64, ge=1)
    """Dimensions of the random vector."""
    beta: float = Field(1.0, ge=0)
    """Factor of the divergence from the prior; 1: the bound of the paper for pixels of unit variance (beta-VAE, Higgins
    et al. 2017)."""


class Vae(base.Objective):
    """The negative evidence bound of the main view, on the scale of a mean squared error.

    The pooled vector gives mean and variance of a normal distribution; a sample of it is spread over a grid of tokens,
    each of which predicts its square linearly, as in `denoising`.
    """

    Options = VaeOptions

    def __init__(self, options: VaeOptions, encoder: DualEncoder, vocabulary: base.Vocabulary) -> None:
        super().__init__()
        self.options = options
        self.normal = nn.Linear(encoder.vision.width, 2 * options.latent)
        self.spread = nn.Linear(options.latent, PLACES**2 * WIDTH)
        self.decoder = heads.PlaceHead(WIDTH, PLACES, 3, encoder.vision.image_size)

    def sample_targets(self, inputs: base.Inputs, random: RowRandom, encoder: DualEncoder) -> dict[str, Tensor]:
        return {"vae.noise": random.normal(self.options.latent)}

    def required_passes(self) -> tuple[base.EncoderPass, ...]:
        return (base.IMAGE,)

    def predict(self, features: base.Features, inputs: base.Inputs, encoder: DualEncoder) -> base.Predictions:
        mean, log_variance = self.normal(features[base.IMAGE].pooled).float().chunk(2, dim=1)
        log_variance = log_variance.clamp(-BOUND, BOUND)
        sample = mean + (log_variance / 2).exp() * inputs["vae.noise"]
        tokens = nn.functional.gelu(self.spread(sample)).view(len(sample), PLACES**2, WIDTH)
        return {
            "image": self.decoder(tokens),
            "target": encoder.vision.normalize(inputs["view.main"]),
            "mean": mean,
            "log_variance": log_variance,
        }

    def loss(self, predictions: base.Predictions, inputs: base.Inputs, world: World) -> base.Output:
        side = predictions["target"].shape[-1]
        predicted, target = (heads.patchify(predictions[name], side) for name in ("image", "target"))
        everywhere = torch.ones(target.shape[:2], dtype=torch.bool, device=target.device)
        error, _ = prediction.masked_patches(predicted, target, everywhere)
        divergence = divergence_from_prior(predictions["mean"], predictions["log_variance"])
        # -log p(x | z) of pixels of unit variance is half their summed squared error, up to a constant.
        total = error + 2 * self.options.beta / target.shape[-1] * divergence
        metrics: dict[str, tuple[Tensor, Tensor | float]] = {
            "explained": explained(error.detach(), target, everywhere),
            "divergence": (divergence.detach(), float(len(target))),
        }
        return base.Output(total, metrics)

    def visualize(self, predictions: base.Predictions, inputs: base.Inputs, encoder: DualEncoder) -> Tensor:
        """The image and the reconstruction."""
        return torch.stack([inputs["view.main"], encoder.vision.denormalize(predictions["image"])], 1)


def divergence_from_prior(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(0, 1)) in nats, summed over dimensions and samples [B, D] (the paper's appendix B)."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum()
