"""Regression of masked patches (MAE, arXiv:2111.06377)."""

from torch import Tensor

from mmssl.losses.precision import in_float32


@in_float32
def masked_patches(predicted: Tensor, target: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over masked patches of the mean squared error of their values, and their count.

    `predicted` and `target` [..., P] hold one patch's values in the last dimension; `mask` bool [...] is True
    where the patch was hidden from the encoder.
    """
    errors = (predicted - target).square().mean(-1)
    hidden = mask.to(errors.dtype)
    return (errors * hidden).sum(), hidden.sum()


@in_float32
def normalise_patches(patches: Tensor) -> Tensor:
    """Each patch [..., P] with mean 0 and (unbiased) variance 1 over its own values: MAE's better target."""
    mean, variance = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
    return (patches - mean) / (variance + 1e-6).sqrt()
