"""Masked autoencoding of images: MAE (He et al. 2021) on ViTs, SimMIM (Xie et al. 2021) on other towers."""

import torch
from pydantic import Field
from torch import Tensor, nn

from mmssl.distributed import World
from mmssl.losses import prediction
from mmssl.models import DualEncoder, VisionTower, heads
from mmssl.objectives import base
from mmssl.objectives._patch_masking import hidden_patches, visible_pass, visible_patches
from mmssl.rng import RowRandom

MOST_CELLS = 14
"""Largest number of squares per side to hide for towers without patches (as for a ViT/16 at 224 pixels)."""


class MaeOptions(base.ObjectiveOptions):
    """Options of masked autoencoding."""

    weight: float = Field(0.1, ge=0)
    """Factor of its loss in the total."""
    mask_ratio: float = Field(0.75, gt=0, lt=1)
    """Fraction of hidden patches."""
    normalise: bool = True
    """Predict each patch standardised by its own mean and deviation."""
    decoder_width: int | None = Field(None, ge=32, multiple_of=32)
    """Default: half of the tower's width, at most the paper's 512."""
    decoder_depth: int = Field(4, ge=1)
    """Blocks of the decoder (the paper: 8). Only ViTs have one; other towers predict linearly."""


class Mae(base.Objective):
    """Predict the hidden patches of the main view from the visible ones."""

    Options = MaeOptions

    def __init__(self, options: MaeOptions, encoder: DualEncoder, vocabulary: base.Vocabulary) -> None:
        super().__init__()
        vision = encoder.vision
        self.options = options
        self.decoder: nn.Module
        if vision.grid is not None and vision.patch_size is not None and vision.token_width is not None:
            self.cell = vision.patch_size
            self.read = visible_pass(options.mask_ratio)
            width = options.decoder_width or min(512, max(32, vision.width // 64 * 32))
            size = heads.DecoderSize(width, options.decoder_depth, width // 32)
            values = 3 * self.cell**2
            self.decoder = heads.PatchDecoder(vision.token_width, vision.width, vision.grid, values, size)
            # A ViT leaves out the margin of an image that its patches do not divide.
            self.side = vision.grid[0] * self.cell
        else:
            self.side = vision.image_size
            self.cell = vision.image_size // cells_of(vision.image_size)
            self.read = base.EncoderPass("vision", "mae.image")
            self.decoder = heads.PlaceHead(*base.token_grid(vision, "mae"), 3, vision.image_size)

    def sample_targets(self, inputs: base.Inputs, random: RowRandom, encoder: DualEncoder) -> dict[str, Tensor]:
        images = self._covered(inputs)
        if self.read.mask:
            drawn = visible_patches(inputs, random, encoder, self.read)
            keep = {**inputs, **drawn}[self.read.mask]
            return {**drawn, "mae.hidden": hidden_patches(keep, images[0, 0].numel() // self.cell**2)}
        patches = images[0, 0].numel() // self.cell**2
        order = random.uniform(patches).argsort(1)
        hidden = hidden_patches(order[:, : max(1, int(patches * (1 - self.options.mask_ratio)))], patches)
        return {"mae.hidden": hidden, "mae.image": hide(images, hidden, self.cell, encoder.vision)}

    def _covered(self, inputs: base.Inputs) -> Tensor:
        """The part of the main view that patches cover, uint8 [B, 3, side, side]."""
        return inputs["view.main"][..., : self.side, : self.side]

    def num_terms(self, inputs: base.Inputs) -> Tensor:
        return inputs["mae.hidden"].sum().float()

    def required_passes(self) -> tuple[base.EncoderPass, ...]:
        return (self.read,)

    def predict(self, features: base.Features, inputs: base.Inputs, encoder: DualEncoder) -> base.Predictions:
        encoded = features[self.read]
        if self.read.mask:
            predicted = self.decoder(encoded.tokens, encoded.pooled, inputs[self.read.mask])
        else:
            predicted = heads.patchify(self.decoder(encoded.tokens), self.cell)
        target = heads.patchify(encoder.vision.normalize(self._covered(inputs)), self.cell)
        return {
            "patches": predicted,
            "target": prediction.normalise_patches(target) if self.options.normalise else target,
        }

    def loss(self, predictions: base.Predictions, inputs: base.Inputs, world: World) -> base.Output:
        target, hidden = predictions["target"], inputs["mae.hidden"]
        total, _ = prediction.masked_patches(predictions["patches"], target, hidden)
        return base.Output(total, {"explained": explained(total.detach(), target, hidden)})

    def visualize(self, predictions: base.Predictions, inputs: base.Inputs, encoder: DualEncoder) -> Tensor:
        """The image, its visible part, and the reconstruction."""
        main, vision = self._covered(inputs), encoder.vision
        patches = heads.patchify(vision.normalize(main), self.cell)
        predicted = predictions["patches"].float()
        if self.options.normalise:
            predicted = predicted * (patches.var(-1, keepdim=True) + 1e-6).sqrt() + patches.mean(-1, keepdim=True)
        image = torch.where(inputs["mae.hidden"].unsqueeze(-1), predicted, patches)
        visible = hide(main, inputs["mae.hidden"], self.cell, vision)
        return torch.stack([main, visible, vision.denormalize(heads.unpatchify(image, self.cell))], 1)


def explained(error: Tensor, target: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The explained fraction of the hidden values' variance around each image's mean, as a sum and its count.

    `error` sums the hidden patches' mean squared errors; `target` [B, N, P]; `hidden` bool [B, N].
    """
    weight = hidden.unsqueeze(-1).to(target.dtype)
    mean = (target * weight).sum((1, 2), keepdim=True) / (weight.sum((1, 2), keepdim=True) * target.shape[-1]).clamp(1)
    spread, _ = prediction.masked_patches(mean.expand_as(target), target, hidden)
    return spread - error, spread


def hide(images: Tensor, hidden: Tensor, cell: int, vision: VisionTower) -> Tensor:
    """Images uint8 [B, 3, S, S] with the mean colour of the tower in the squares where `hidden` bool [B, N] is True."""
    side = images.shape[-1] // cell
    cover = hidden.view(-1, 1, side, side).repeat_interleave(cell, 2).repeat_interleave(cell, 3)
    return torch.where(cover, vision.mean.round().to(torch.uint8), images)


def cells_of(image_size: int) -> int:
    """Squares per side: the largest divisor of the side in pixels up to MOST_CELLS."""
    return max(n for n in range(1, MOST_CELLS + 1) if image_size % n == 0)
