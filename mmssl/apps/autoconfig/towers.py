"""Towers that are trained from scratch: settings from presets, with their costs."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from mmssl.apps.autoconfig.inputs import Machine, Pairs
from mmssl.config import read_tree


@dataclass(frozen=True)
class Towers:
    """A vision tower, a text tower, and the recipe that goes with them."""

    preset: str
    """Name of the preset with their settings."""
    why: str
    """Reason for the choice, for the user."""
    least_pairs: int
    """Number of pairs from which these towers are worth their cost."""
    most_batch: int
    """Larger batches gain little at the number of pairs these towers are for."""
    parameters: int
    """Parameters of both towers, with the full vocabulary."""
    image_bytes: int
    """Bytes of fp32 activations per image, at the largest of `sizes`."""
    token_bytes: int
    """Bytes of fp32 activations per caption token."""
    sizes: tuple[int, ...]
    """Input sides in pixels, ascending."""
    recipe: Mapping[str, str] = field(default_factory=dict)
    """Further dotted keys of the preset to use, each with its reason."""

    def setting(self, key: str) -> Any:
        """Value of a dotted key in the preset. None: the preset does not set it."""
        value: Any = _preset(self.preset)
        for name in key.split("."):
            value = value.get(name, {})
        return copy.deepcopy(value) if value != {} else None

    @property
    def lr(self) -> float:
        """Peak learning rate at a batch of `lr_batch`."""
        return float(self.setting("optim.lr"))

    @property
    def lr_batch(self) -> int:
        """Batch size of the preset, for which its learning rate is tuned."""
        return int(self.setting("data.batch_size"))

    def side(self, pairs: Pairs) -> int:
        """The largest input size up to the median image, or else the smallest."""
        return max([side for side in self.sizes if side <= pairs.image_side], default=self.sizes[0])

    def pair_bytes(self, side: int, tokens: int) -> int:
        """Bytes of fp32 activations per pair; half precision needs less."""
        return int(self.image_bytes * (side / self.sizes[-1]) ** 2) + self.token_bytes * tokens


TOWERS = (
    Towers(
        preset="small",
        why="a small ResNet and a BERT of one layer, which learn from few pairs and train on a CPU",
        least_pairs=0,
        most_batch=256,
        parameters=3_600_000,
        image_bytes=4_000_000,
        token_bytes=18_000,
        sizes=(64, 96),
        recipe={
            "data.views.main": "few pairs are seen often: each time with other crops, rotations and colours",
            "train.ema": "EMA weights are less noisy after a short training; they become the model",
            "optim.clip_norm": "rare large gradients at this learning rate are clipped",
            "optim.final_lr": "the schedule ends just above zero",
        },
    ),
    Towers(
        preset="medium",
        why="a ResNet-50 and a BERT of six layers: enough pairs for them, too few for a ViT from scratch",
        least_pairs=100_000,
        most_batch=1024,
        parameters=60_000_000,
        image_bytes=87_000_000,
        token_bytes=210_000,
        sizes=(128, 224),
    ),
    Towers(
        preset="large",
        why="open_clip's ViT-B-32 and a BERT of twelve layers, OpenCLIP's choice for millions of pairs",
        least_pairs=3_000_000,
        most_batch=4096,
        parameters=142_000_000,
        image_bytes=32_000_000,
        token_bytes=420_000,
        sizes=(224,),
    ),
)


def choose_towers(pairs: Pairs, machine: Machine) -> Towers:
    """The largest towers for this number of pairs; on a CPU always the small ones."""
    if not machine.on_gpu:
        return TOWERS[0]
    return max((towers for towers in TOWERS if towers.least_pairs <= pairs.count), key=lambda t: t.least_pairs)


@cache
def _preset(name: str) -> dict[str, Any]:
    return read_tree(name)
