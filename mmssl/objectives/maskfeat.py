"""Prediction of a momentum encoder's features of hidden patches (data2vec, Baevski et al. 2022, arXiv:2202.03555; with
a decoder that sees the visible patches only, as I-JEPA, Assran et al. 2023, arXiv:2301.08243)."""

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mmssl.distributed import World
from mmssl.losses import prediction
from mmssl.models import DualEncoder, heads
from mmssl.objectives import base
from mmssl.objectives._momentum import MovingAverage, momentum_at
from mmssl.objectives._patch_masking import hidden_patches, visible_pass, visible_patches
from mmssl.objectives.mae import cells_of, explained, hide
from mmssl.rng import RowRandom


class MaskfeatOptions(base.ObjectiveOptions):
    """Options of the prediction of features."""

    weight: float = Field(0.1, ge=0)
    """Factor of its loss in the total."""
    mask_ratio: float = Field(0.75, gt=0, lt=1)
    """Fraction of hidden patches. With the same ratio, `mae` and `contrastive` share the mask and the encoder pass."""
    momentum: float = Field(0.996, ge=0, lt=1)
    """Momentum of the moving average at the start of the training; it rises to 1 as a cosine."""
    beta: float = Field(2.0, gt=0)
    """Error of a value from which the loss grows linearly in place of quadratically."""
    decoder_width: int | None = Field(None, ge=32, multiple_of=32)
    """Default: half of the tower's width, at most 512."""
    decoder_depth: int = Field(4, ge=1)
    """Blocks of the decoder. Only ViTs have one; other towers predict linearly."""


class Maskfeat(base.Objective):
    """Predict the features that the momentum encoder, which sees the whole image, has at hidden places.

    The targets are the tower's last tokens, each standardised over its own values.
    """

    Options = MaskfeatOptions
    has_own_encoder = True

    def __init__(self, options: MaskfeatOptions, encoder: DualEncoder, vocabulary: base.Vocabulary) -> None:
        super().__init__()
        vision = encoder.vision
        self.options = options
        self.momentum = options.momentum
        self.slow = MovingAverage({"vision": vision})
        self.token_width, self.places = base.token_grid(vision, "maskfeat")
        self.decoder: nn.Module
        if vision.grid is not None:
            self.read = visible_pass(options.mask_ratio)
            width = options.decoder_width or min(512, max(32, vision.width // 64 * 32))
            size = heads.DecoderSize(width, options.decoder_depth, width // 32)
            self.decoder = heads.PatchDecoder(self.token_width, vision.width, vision.grid, self.token_width, size)
        else:
            self.read = base.EncoderPass("vision", "maskfeat.image")
            self.decoder = nn.Linear(self.token_width, self.token_width)

    def on_step_start(self, progress: float) -> None:
        self.momentum = momentum_at(self.options.momentum, progress)

    def sample_targets(self, inputs: base.Inputs, random: RowRandom, encoder: DualEncoder) -> dict[str, Tensor]:
        images = inputs["view.main"]
        self.slow.follow({"vision": encoder.vision}, self.momentum)
        targets = {"maskfeat.features": self.slow.in_parts(self._features, images)}
        places = targets["maskfeat.features"].shape[1]
        if self.read.mask:
            drawn = visible_patches(inputs, random, encoder, self.read)
            hidden = hidden_patches({**inputs, **drawn}[self.read.mask], places)
            return {**targets, **drawn, "maskfeat.hidden": hidden}
        return {**targets, **self._cover(images, random, encoder)}

    def num_terms(self, inputs: base.Inputs) -> Tensor:
        return inputs["maskfeat.hidden"].sum().float()

    def required_passes(self) -> tuple[base.EncoderPass, ...]:
        return (self.read,)

    def predict(self, features: base.Features, inputs: base.Inputs, encoder: DualEncoder) -> base.Predictions:
        encoded = features[self.read]
        if not self.read.mask:
            return {"features": self.decoder(encoded.tokens)}
        return {"features": self.decoder(encoded.tokens, encoded.pooled, inputs[self.read.mask])}

    def loss(self, predictions: base.Predictions, inputs: base.Inputs, world: World) -> base.Output:
        predicted, target = predictions["features"].float(), inputs["maskfeat.features"]
        hidden = inputs["maskfeat.hidden"]
        errors = F.smooth_l1_loss(predicted, target, reduction="none", beta=self.options.beta).mean(-1)
        squared, _ = prediction.masked_patches(predicted.detach(), target, hidden)
        return base.Output((errors * hidden).sum(), {"explained": explained(squared, target, hidden)})

    def _features(self, slow: nn.ModuleDict, images: Tensor) -> Tensor:
        """Standardised tokens [B, T, token_width]."""
        tokens = slow["vision"](images).tokens.float()
        return F.layer_norm(tokens, tokens.shape[-1:])

    def _cover(self, images: Tensor, random: RowRandom, encoder: DualEncoder) -> dict[str, Tensor]:
        """Images with covered squares, and the places of the feature map whose centres they cover, bool [B, T]."""
        side = cells_of(images.shape[-1])
        order = random.uniform(side**2).argsort(1)
        kept = max(1, int(side**2 * (1 - self.options.mask_ratio)))
        covered = hidden_patches(order[:, :kept], side**2)
        squares = covered.view(-1, 1, side, side).float()
        hidden = F.interpolate(squares, size=(self.places, self.places), mode="nearest-exact").flatten(1) > 0
        image = hide(images, covered, images.shape[-1] // side, encoder.vision)
        return {"maskfeat.image": image, "maskfeat.hidden": hidden}
