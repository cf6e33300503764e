"""Prediction of the colours of a gray image (Zhang et al. 2016)."""

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from mmssl.distributed import World
from mmssl.models import DualEncoder, heads
from mmssl.objectives import base
from mmssl.rng import RowRandom

BIN = 10
"""Side of a bin in the ab plane."""
NEIGHBOURS, SIGMA = 5, 5.0
"""Number of nearest bins of a colour, and the Gaussian that weights them (section 2.1 of the paper)."""
SQUARES = 8
"""Smallest number of predicted squares per side."""
_XYZ = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
_WHITE = (0.95047, 1.0, 1.08883)
GRAY_IMAGE = base.EncoderPass("vision", "colorization.image")


class ColorizationOptions(base.ObjectiveOptions):
    """Options of colorization."""

    weight: float = Field(0.05, ge=0)
    """Factor of its loss in the total."""
    rebalance: float = Field(0.5, ge=0, le=1)
    """Fraction of the uniform distribution mixed into the frequencies that weight rare colours (the paper's lambda)."""
    memory: float = Field(0.99, ge=0, lt=1)
    """Momentum of the running distribution of colours."""


class Colorization(base.Objective):
    """Classify the colour of each square of the main view from its lightness, with higher weights for rare colours.

    The classes are the 261 bins of side 10 in the ab plane that contain an sRGB colour. (The paper's list has 313, with
    a margin outside sRGB.) The distribution of colours is measured on the batches of the run.
    """

    Options = ColorizationOptions

    def __init__(self, options: ColorizationOptions, encoder: DualEncoder, vocabulary: base.Vocabulary) -> None:
        super().__init__()
        width, places = base.token_grid(encoder.vision, "colorization")
        self.options = options
        bins = color_bins().clone()
        self.register_buffer("bins", bins, persistent=False)
        self.register_buffer("frequency", torch.full((len(bins),), 1 / len(bins)))
        side = places * -(-SQUARES // places)
        self.head = heads.PlaceHead(width, places, len(bins), side)

    def sample_targets(self, inputs: base.Inputs, random: RowRandom, encoder: DualEncoder) -> dict[str, Tensor]:
        lab = rgb_to_lab(inputs["view.main"])
        squares = F.adaptive_avg_pool2d(lab[:, 1:], self.head.side)
        gray = (lab[:, :1] * 2.55).expand(-1, 3, -1, -1)
        return {"colorization.image": gray, "colorization.ab": squares.flatten(2).mT.contiguous()}

    def num_terms(self, inputs: base.Inputs) -> Tensor:
        ab = inputs["colorization.ab"]
        return torch.full((), float(ab[..., 0].numel()), device=ab.device)

    def required_passes(self) -> tuple[base.EncoderPass, ...]:
        return (GRAY_IMAGE,)

    def predict(self, features: base.Features, inputs: base.Inputs, encoder: DualEncoder) -> base.Predictions:
        return {"logits": self.head(features[GRAY_IMAGE].tokens).flatten(2).mT}

    def loss(self, predictions: base.Predictions, inputs: base.Inputs, world: World) -> base.Output:
        logits, ab = predictions["logits"].float(), inputs["colorization.ab"]
        target, nearest = soft_bins(ab, self.get_buffer("bins"))
        weights = rarity(self.get_buffer("frequency"), self.options.rebalance)[nearest]
        errors = -(target * logits.log_softmax(-1)).sum(-1)
        hits = (logits.detach().argmax(-1) == nearest).sum()
        return base.Output((weights * errors).sum(), {"accuracy": (hits, float(nearest.numel()))})

    def on_step_end(self, inputs: base.Inputs, world: World) -> None:
        bins, frequency = self.get_buffer("bins"), self.get_buffer("frequency")
        nearest = nearest_bins(inputs["colorization.ab"], bins).flatten()
        # Not torch.bincount: its output size makes the host wait for the GPU.
        counts = torch.zeros_like(frequency).scatter_add_(0, nearest, torch.ones_like(nearest, dtype=frequency.dtype))
        counts = world.sum(counts)
        frequency.lerp_(counts / counts.sum().clamp(min=1), 1 - self.options.memory)


def rgb_to_lab(images: Tensor) -> Tensor:
    """sRGB bytes [B, 3, H, W] -> CIE L*a*b* under D65, L in 0..100."""
    rgb = images.float() / 255
    linear = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    red, green, blue = linear.unbind(1)
    rows = [(r * red + g * green + b * blue) / white for (r, g, b), white in zip(_XYZ, _WHITE, strict=True)]
    xyz = torch.stack(rows, 1)
    f = torch.where(xyz > 0.008856, xyz.clamp(min=1e-8) ** (1 / 3), 7.787 * xyz + 16 / 116)
    x, y, z = f.unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


@cache
def color_bins() -> Tensor:
    """Centres (a, b) of the bins that contain an sRGB colour, float32 [261, 2], sorted. Cached: clone it."""
    level = np.arange(0, 256, 3, dtype=np.uint8)
    cube = torch.from_numpy(np.stack(np.meshgrid(level, level, level), -1).reshape(1, -1, 1, 3)).permute(0, 3, 1, 2)
    indices: Tensor = torch.unique((rgb_to_lab(cube)[0, 1:, :, 0].T / BIN).round(), dim=0)
    return indices * BIN


def nearest_bins(ab: Tensor, bins: Tensor) -> Tensor:
    """Index of the bin nearest to each colour [..., 2]."""
    nearest: Tensor = torch.cdist(ab.float(), bins).argmin(-1)
    return nearest


def soft_bins(ab: Tensor, bins: Tensor) -> tuple[Tensor, Tensor]:
    """Each colour [..., 2] spread over its NEIGHBOURS nearest bins, [..., bins], and the nearest bin [...]."""
    distances, indices = torch.cdist(ab.float(), bins).topk(NEIGHBOURS, largest=False)
    near = (-(distances**2) / (2 * SIGMA**2)).softmax(-1)
    spread = torch.zeros(*ab.shape[:-1], len(bins), device=ab.device)
    return spread.scatter(-1, indices, near), indices[..., 0]


def rarity(frequency: Tensor, uniform: float) -> Tensor:
    """Weight of each bin: the inverse of its frequency mixed with a uniform one, 1 on average over the frequencies
    (equation 4 of the paper)."""
    weights = 1 / ((1 - uniform) * frequency + uniform / len(frequency))
    return weights / (frequency * weights).sum()
