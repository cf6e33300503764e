"""Features to try losses on."""

import torch
from torch import Tensor
from torch.nn import functional as F


def unit_rows(rows: int, width: int, *, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random rows of length 1 [rows, width] that want a gradient."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, generator=generator, dtype=dtype), dim=1).requires_grad_()


def gradients(value: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Of `value` with respect to each input."""
    return list(torch.autograd.grad(value, inputs, retain_graph=True))
