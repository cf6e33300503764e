"""Moving averages of modules, which objectives use as teachers."""

import copy
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

ROWS = 256
"""Samples per forward pass of a moving average, which keeps no activations."""


class MovingAverage(nn.Module):
    """An exponential moving average of modules, in evaluation mode. It is part of checkpoints and never trained."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.average = copy.deepcopy(nn.ModuleDict(modules)).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "MovingAverage":
        """Stay in evaluation mode: no dropout, and batch norms with the statistics that they follow."""
        return super().train(False)

    @torch.no_grad()
    def follow(self, modules: Mapping[str, nn.Module], momentum: float) -> None:
        """Move the weights by 1 - momentum towards those of the modules, and copy their buffers."""
        fast, slow = nn.ModuleDict(modules), self.average
        # The modules are registered in a fresh dict, and this changes nothing in them.
        torch._foreach_lerp_(list[Tensor](slow.parameters()), list[Tensor](fast.parameters()), 1 - momentum)
        for own, followed in zip(slow.buffers(), fast.buffers(), strict=True):
            own.copy_(followed)

    @torch.no_grad()
    def in_parts(self, encode: Callable[[nn.ModuleDict, Tensor], Tensor], images: Tensor) -> Tensor:
        """`encode` of the averaged modules and the images, a few at a time."""
        parts = [encode(self.average, images[a : a + ROWS]) for a in range(0, len(images), ROWS)]
        return torch.cat(parts)


def momentum_at(start: float, progress: float) -> float:
    """The momentum at the fraction `progress` of the training: from `start` to 1 as a cosine (BYOL, section 3.2)."""
    return 1 - (1 - start) * (math.cos(math.pi * progress) + 1) / 2
