"""Exponential moving average of the dual encoder's weights."""

import torch
from torch import Tensor

from mmssl.distributed import part
from mmssl.models.dual_encoder import DualEncoder


class Ema:
    """A second set of weights that follows the dual encoder's; batch-norm statistics are copied.

    Attributes:
        weights: by the names of the encoder's state dict; split over the processes where the encoder's are.
    """

    def __init__(self, encoder: DualEncoder, decay: float) -> None:
        self.weights = {name: tensor.detach().clone() for name, tensor in encoder.state_dict().items()}
        self.decay = decay

    @torch.no_grad()
    def update(self, encoder: DualEncoder, step: int, finite: Tensor) -> None:
        """Move towards `encoder` after update `step` (from 0); not at all where the update was not `finite`.

        Early on the decay is (1 + step) / (10 + step), so that the random start is soon forgotten.
        """
        pull = (1 - min(self.decay, (1 + step) / (10 + step))) * finite.float()
        averaged = {name for name, _ in encoder.named_parameters(remove_duplicate=False)}
        for name, tensor in encoder.state_dict().items():
            own, other = part(self.weights[name]), part(tensor)
            if name in averaged:
                own.lerp_(other, pull)
            else:
                own.copy_(other)
