"""Exponential moving average of the dual encoder's weights."""

import copy

import torch
from torch import Tensor

from mmssl.models.dual_encoder import DualEncoder


class Ema:
    """A second dual encoder whose weights follow the first one's; batch-norm statistics are copied."""

    def __init__(self, encoder: DualEncoder, decay: float) -> None:
        self.encoder = copy.deepcopy(encoder).requires_grad_(False).eval()
        self.decay = decay

    @torch.no_grad()
    def update(self, encoder: DualEncoder, step: int, finite: Tensor) -> None:
        """Move towards `encoder` after update `step` (from 0); not at all where the update was not `finite`.

        Early on the decay is (1 + step) / (10 + step), so that the random start is soon forgotten.
        """
        pull = (1 - min(self.decay, (1 + step) / (10 + step))) * finite.float()
        for own, parameter in zip(self.encoder.parameters(), encoder.parameters(), strict=True):
            own.lerp_(parameter, pull)
        for buffer, other in zip(self.encoder.buffers(), encoder.buffers(), strict=True):
            buffer.copy_(other)
