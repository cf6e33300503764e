"""Small heads of objectives."""

import torch.nn.functional as F
from torch import Tensor, nn


def mlp(width: int, hidden: int, dim: int) -> nn.Sequential:
    """Two layers. No batch norm, so that a sample's head output depends on that sample alone."""
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, dim, bias=False))


def unit(x: Tensor) -> Tensor:
    """L2-normalised over the last dimension, in float32."""
    return F.normalize(x.float(), dim=-1)
