"""Agreement of two views without negatives (Barlow Twins, Zbontar et al. 2021; VICReg, Bardes et al. 2022)."""

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from mmssl.config import ViewConfig
from mmssl.distributed import World
from mmssl.losses import redundancy
from mmssl.models import DualEncoder, heads
from mmssl.objectives import base
from mmssl.objectives._pairs import matching_accuracy
from mmssl.objectives.simclr import ViewOptions, two_views


class RedundancyOptions(ViewOptions):
    """Options of the reduction of redundancy."""

    weight: float = Field(0.1, ge=0)
    """Factor of its loss in the total."""
    kind: Literal["barlow", "vicreg"] = "vicreg"
    """`barlow`: the cross-correlation of views becomes the identity. `vicreg`: equal views, dimensions that vary, and
    no covariances."""
    with_main: bool = False
    """Use `main` as the first image view, which is encoded anyway."""
    head_dim: int = Field(512, ge=2)
    """Dimension of the compared vectors."""
    off_diagonal: float = Field(0.005, ge=0)
    """Weight of the correlations between different dimensions (`barlow`)."""
    invariance: float = Field(1.0, ge=0)
    """Weight of the difference between the views (`vicreg`; the paper's 25, divided by 25, as the next two)."""
    variance: float = Field(1.0, ge=0)
    """Weight of the hinge on the deviation of each dimension (`vicreg`)."""
    covariance: float = Field(0.04, ge=0)
    """Weight of the covariances between dimensions (`vicreg`)."""


class Redundancy(base.Objective):
    """Make two views of an image equal and the dimensions of their vectors independent over the global batch.

    It reads simclr's views, and shares their encoder passes when both are on. The head has no batch norm, other than in
    the papers.
    """

    Options = RedundancyOptions
    batch_coupled = True

    def __init__(self, options: RedundancyOptions, encoder: DualEncoder, vocabulary: base.Vocabulary) -> None:
        super().__init__()
        self.options = options
        self.head = heads.mlp(encoder.vision.width, options.head_width, options.head_dim)
        self.passes, self.requested = two_views(options, options.with_main)

    def views(self) -> Mapping[str, ViewConfig]:
        return self.requested

    def required_passes(self) -> tuple[base.EncoderPass, ...]:
        return self.passes

    def predict(self, features: base.Features, inputs: base.Inputs, encoder: DualEncoder) -> base.Predictions:
        first, second = (self.head(features[view].pooled).float() for view in self.passes)
        return {"first": first, "second": second}

    def loss(self, predictions: base.Predictions, inputs: base.Inputs, world: World) -> base.Output:
        options, first, second = self.options, predictions["first"], predictions["second"]
        if options.kind == "barlow":
            total = redundancy.barlow_twins(first, second, options.off_diagonal, world=world)
        else:
            weights = options.invariance, options.variance, options.covariance
            total = redundancy.vicreg(first, second, *weights, world=world)
        first, second = (_centred(views, world) for views in (first, second))
        return base.Output(total, {"accuracy": matching_accuracy(first, second, world)})


@torch.no_grad()
def _centred(views: Tensor, world: World) -> Tensor:
    """Unit vectors around the mean of the global batch, which says nothing on a sample."""
    mean = world.sum(views.mean(0)) / world.size
    return heads.unit(views - mean)
