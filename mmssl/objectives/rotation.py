"""Prediction of an image's rotation (RotNet, Gidaris et al. 2018)."""

import torch
from pydantic import Field
from torch import Tensor, nn

from mmssl.distributed import World
from mmssl.models import DualEncoder
from mmssl.objectives import base
from mmssl.rng import RowRandom

TURNED_IMAGE = base.EncoderPass("vision", "rotation.image")


class RotationOptions(base.ObjectiveOptions):
    """Options of rotation prediction."""

    weight: float = Field(0.1, ge=0)
    """Factor of its loss in the total."""


class Rotation(base.Objective):
    """Classify the rotation of the main view by 0, 90, 180 or 270 degrees."""

    Options = RotationOptions

    def __init__(self, options: RotationOptions, encoder: DualEncoder, vocabulary: base.Vocabulary) -> None:
        super().__init__()
        self.head = nn.Linear(encoder.vision.width, 4)

    def sample_targets(self, inputs: base.Inputs, random: RowRandom, encoder: DualEncoder) -> dict[str, Tensor]:
        turns = random.integers(4)
        return {"rotation.turns": turns, "rotation.image": rotate(inputs["view.main"], turns)}

    def required_passes(self) -> tuple[base.EncoderPass, ...]:
        return (TURNED_IMAGE,)

    def predict(self, features: base.Features, inputs: base.Inputs, encoder: DualEncoder) -> base.Predictions:
        return {"logits": self.head(features[TURNED_IMAGE].pooled)}

    def loss(self, predictions: base.Predictions, inputs: base.Inputs, world: World) -> base.Output:
        return base.classification(predictions["logits"], inputs["rotation.turns"])


def rotate(images: Tensor, turns: Tensor) -> Tensor:
    """Images [B, 3, S, S], each turned counter-clockwise by its number of quarter turns [B]."""
    turned = torch.stack([torch.rot90(images, k, (2, 3)) for k in range(4)])
    return turned[turns, torch.arange(len(images), device=images.device)]
