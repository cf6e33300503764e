"""Which way up is the image (RotNet, Gidaris et al. 2018)."""

import torch
from pydantic import Field
from torch import Tensor, nn

from mmssl.distributed import World
from mmssl.models.dual_encoder import DualEncoder
from mmssl.objectives._base import (
    EncoderPass,
    Features,
    Inputs,
    Objective,
    ObjectiveOptions,
    Output,
    Predictions,
    Vocabulary,
    classification,
)
from mmssl.rng import RowRandom

TURNED_IMAGE = EncoderPass("vision", "rotation.image")


class RotationOptions(ObjectiveOptions):
    """Options of rotation prediction."""

    weight: float = Field(0.1, ge=0)
    """Factor of its loss in the total."""


class Rotation(Objective):
    """The main view, a square without borders, is turned by 0, 90, 180 or 270 degrees; the tower says by how much."""

    Options = RotationOptions

    def __init__(self, options: RotationOptions, encoder: DualEncoder, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.head = nn.Linear(encoder.vision.width, 4)

    def sample_targets(self, inputs: Inputs, random: RowRandom, encoder: DualEncoder) -> dict[str, Tensor]:
        turns = random.integers(4)
        return {"rotation.turns": turns, "rotation.image": rotate(inputs["view.main"], turns)}

    def required_passes(self) -> tuple[EncoderPass, ...]:
        return (TURNED_IMAGE,)

    def predict(self, features: Features, inputs: Inputs, encoder: DualEncoder) -> Predictions:
        return {"logits": self.head(features[TURNED_IMAGE].pooled)}

    def loss(self, predictions: Predictions, inputs: Inputs, world: World) -> Output:
        return classification(predictions["logits"], inputs["rotation.turns"])


def rotate(images: Tensor, turns: Tensor) -> Tensor:
    """Each image [B, 3, S, S] turned by its number of quarter turns [B], counter-clockwise."""
    turned = torch.stack([torch.rot90(images, k, (2, 3)) for k in range(4)])
    return turned[turns, torch.arange(len(images), device=images.device)]
