"""Prediction of a momentum encoder's vector of another view (BYOL, Grill et al. 2020, arXiv:2006.07733)."""

from collections.abc import Mapping

from pydantic import Field
from torch import Tensor, nn

from mmssl.config import ViewConfig
from mmssl.distributed import World
from mmssl.models import DualEncoder, heads
from mmssl.objectives import base
from mmssl.objectives._momentum import MovingAverage, momentum_at
from mmssl.objectives.simclr import ViewOptions, two_views
from mmssl.rng import RowRandom


class ByolOptions(ViewOptions):
    """Options of the prediction of another view."""

    weight: float = Field(0.1, ge=0)
    """Factor of its loss in the total."""
    with_main: bool = False
    """Use `main` as the first image view, which is encoded anyway."""
    head_dim: int = Field(256, ge=1)
    """Dimension of the compared vectors."""
    momentum: float = Field(0.99, ge=0, lt=1)
    """Momentum of the moving average at the start of the training; it rises to 1 as a cosine."""


class Byol(base.Objective):
    """Predict, from each view, the vector that the momentum encoder has of the other one.

    It reads simclr's views, and shares their encoder passes when both are on. The heads have no batch norm, other than
    in the paper.
    """

    Options = ByolOptions
    has_own_encoder = True

    def __init__(self, options: ByolOptions, encoder: DualEncoder, vocabulary: base.Vocabulary) -> None:
        super().__init__()
        self.options = options
        self.head = heads.mlp(encoder.vision.width, options.head_width, options.head_dim)
        self.predictor = heads.mlp(options.head_dim, options.head_width, options.head_dim)
        self.slow = MovingAverage({"vision": encoder.vision, "head": self.head})
        self.passes, self.requested = two_views(options, options.with_main)
        self.momentum = options.momentum

    def views(self) -> Mapping[str, ViewConfig]:
        return self.requested

    def on_step_start(self, progress: float) -> None:
        self.momentum = momentum_at(self.options.momentum, progress)

    def sample_targets(self, inputs: base.Inputs, random: RowRandom, encoder: DualEncoder) -> dict[str, Tensor]:
        self.slow.follow({"vision": encoder.vision, "head": self.head}, self.momentum)
        first, second = (self.slow.in_parts(self._vector, inputs[view.input]) for view in self.passes)
        return {"byol.first": first, "byol.second": second}

    def required_passes(self) -> tuple[base.EncoderPass, ...]:
        return self.passes

    def predict(self, features: base.Features, inputs: base.Inputs, encoder: DualEncoder) -> base.Predictions:
        first, second = (self.predictor(self.head(features[view].pooled)) for view in self.passes)
        return {"first": heads.unit(first), "second": heads.unit(second)}

    def loss(self, predictions: base.Predictions, inputs: base.Inputs, world: World) -> base.Output:
        cosines = (predictions["first"] * inputs["byol.second"]).sum(1)
        cosines = (cosines + (predictions["second"] * inputs["byol.first"]).sum(1)) / 2
        # Squared distance of unit vectors, averaged over the two directions.
        return base.Output((2 - 2 * cosines).sum(), {"cosine": (cosines.detach().sum(), float(len(cosines)))})

    def _vector(self, slow: nn.ModuleDict, images: Tensor) -> Tensor:
        return heads.unit(slow["head"](slow["vision"](images).pooled))
