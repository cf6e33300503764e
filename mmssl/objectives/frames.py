"""Prediction of the order of a sample's images, such as frames of a film (Misra et al. 2016; Lee et al. 2017)."""

from itertools import permutations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mmssl.data.transforms import captions
from mmssl.distributed import World
from mmssl.models import DualEncoder
from mmssl.objectives import base

HIDDEN = 256
"""Width of the hidden layer of the head."""
_CODE = f"group.{captions.IMAGE_ORDER}"


class FramesOptions(base.ObjectiveOptions):
    """Options of the order of images."""

    weight: float = Field(0.1, ge=0)
    """Factor of its loss in the total."""
    count: int = Field(3, ge=2, le=4)
    """Number of images to sort; samples with fewer are left out of the loss."""


class Frames(base.Objective):
    """Classify the order of several images of a sample from their pooled vectors side by side.

    The loader shows the images of a sample in random order; the classes are the orders of `count` images.
    """

    Options = FramesOptions

    def __init__(self, options: FramesOptions, encoder: DualEncoder, vocabulary: base.Vocabulary) -> None:
        super().__init__()
        self.options = options
        orders = torch.tensor(list(permutations(range(options.count))))
        self.register_buffer("orders", orders, persistent=False)
        self.head = nn.Sequential(
            nn.Linear(options.count * encoder.vision.width, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, len(orders))
        )

    def images(self) -> int:
        return self.options.count

    def groups(self) -> tuple[str, ...]:
        return (captions.IMAGE_ORDER,)

    def num_terms(self, inputs: base.Inputs) -> Tensor:
        usable, _ = frame_order(inputs[_CODE], self.get_buffer("orders"))
        return usable.sum().float()

    def required_passes(self) -> tuple[base.EncoderPass, ...]:
        further = (base.EncoderPass("vision", f"view.main.{place}") for place in range(1, self.options.count))
        return (base.IMAGE, *further)

    def predict(self, features: base.Features, inputs: base.Inputs, encoder: DualEncoder) -> base.Predictions:
        pooled = [features[one].pooled for one in self.required_passes()]
        return {"logits": self.head(torch.cat(pooled, 1))}

    def loss(self, predictions: base.Predictions, inputs: base.Inputs, world: World) -> base.Output:
        usable, order = frame_order(inputs[_CODE], self.get_buffer("orders"))
        logits = predictions["logits"].float()
        total = (F.cross_entropy(logits, order, reduction="none") * usable).sum()
        hits = ((logits.detach().argmax(1) == order) & usable).sum()
        return base.Output(total, {"accuracy": (hits, usable.sum().float())})


def frame_order(codes: Tensor, orders: Tensor) -> tuple[Tensor, Tensor]:
    """Which samples have enough images, bool [B], and the row of `orders` in which theirs are shown, int64 [B].

    Args:
        codes: int64 [B] of the loader: four bits for each image shown, its place among them from 1 on, 0 for none.
        orders: int64 [K!, K], all orders of K images.
    """
    count = orders.shape[1]
    places = codes.unsqueeze(1) >> (4 * torch.arange(count, device=codes.device)) & 15
    ranks = places.argsort(dim=1, stable=True).argsort(dim=1, stable=True)
    rows = (ranks.unsqueeze(1) == orders).all(2)
    return (places > 0).all(1), rows.long().argmax(1)
