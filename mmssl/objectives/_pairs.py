"""Options of objectives that pair images with captions: which pairs of different samples are right too."""

from typing import Literal

import torch
from torch import Tensor

from mmssl.distributed import World
from mmssl.losses import correct_matches
from mmssl.objectives import _base as base
from mmssl.types import Groups

DIAGONAL = "diagonal"
ACCURACY_ROWS = 512
"""Number of images for accuracy in the batch: its cost is negligible next to the loss."""


class PairOptions(base.ObjectiveOptions):
    """Which pairs of an image and a caption are right."""

    positives: str = DIAGONAL
    """Right pairs. `diagonal`: an image and its own caption. `caption`: also images and captions of samples with the
    same caption. Any other name is a field of the .json (or `cls`): also those of samples with the same value there, as
    of one class or product; a sample without a value has only its own pair."""
    same: Literal["positives", "mask"] = "positives"
    """Use of the further pairs that `positives` finds. `positives`: they are right, and the loss of an image is the
    mean over its right captions (UniCL). `mask`: they are neither right nor wrong and left out of the loss."""


def group_fields(options: PairOptions) -> tuple[str, ...]:
    """Fields that the loader must number for these options."""
    return () if options.positives == DIAGONAL else (options.positives,)


def pair_groups(options: PairOptions, inputs: base.Inputs) -> Groups | None:
    """The groups of this process's samples; None if each image has its own caption only."""
    if options.positives == DIAGONAL:
        return None
    number = inputs[f"group.{options.positives}"]
    sides = torch.stack([inputs["ids"], number] if options.same == "mask" else [number], 1)
    return Groups(sides, sides)


def matching_accuracy(rows: Tensor, columns: Tensor, world: World, groups: Groups | None = None) -> tuple[Tensor, int]:
    """Number of this process's first rows [n, D] that are nearest to their own column [n, D] of the global batch, or to
    one of their group, and the number of rows tested."""
    rows = rows[:ACCURACY_ROWS]
    return correct_matches(rows, columns, world=world, groups=groups).sum(), len(rows)
