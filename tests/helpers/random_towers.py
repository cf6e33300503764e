"""An image tower of a few weights."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmssl.rng import torch_generator


class Tower(nn.Module):
    """An image's mean colour through two layers to a unit vector."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.BatchNorm1d(32), nn.Linear(32, 8))
        with torch.no_grad():
            for parameter in self.layers.parameters():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=torch_generator(str(parameter.shape))))

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.layers(images.float().mean((2, 3)) / 255), dim=-1)
