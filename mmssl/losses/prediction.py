"""Losses of predicted tokens (BERT, CoCa) and predicted patches (MAE, arXiv:2111.06377).

Each returns (sum, count) over items that do not depend on each other, so that micro-batches add up.
"""

from torch import Tensor
from torch.nn import functional as F

from mmssl.losses.common import in_float32

NO_TARGET = -100
"""Marks a position without a target."""


@in_float32
def masked_language(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over targets of -log p(token), and their count.

    `logits` [..., V]; `targets` int64 [...], `NO_TARGET` at positions that were not masked. Pass the masked
    positions only: the vocabulary is the widest dimension of the model.
    """
    total = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=NO_TARGET, reduction="sum")
    return total, (targets != NO_TARGET).sum().to(total.dtype)


@in_float32
def next_token(logits: Tensor, tokens: Tensor, token_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over all tokens except the first of -log p(token | earlier ones), and their count.

    `logits` [B, L, V] at each position of `tokens` int64 [B, L]: this function shifts by one.
    `token_mask` bool [B, L] is False at padding, which is not a target.
    """
    return masked_language(logits[:, :-1], tokens[:, 1:].masked_fill(~token_mask[:, 1:], NO_TARGET))


@in_float32
def masked_patches(predicted: Tensor, target: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over masked patches of the mean squared error of their values, and their count.

    `predicted` and `target` [..., P] hold one patch's values in the last dimension; `mask` bool [...] is True
    for patches hidden from the encoder.
    """
    errors = (predicted - target).square().mean(-1)
    hidden = mask.to(errors.dtype)
    return (errors * hidden).sum(), hidden.sum()


@in_float32
def normalise_patches(patches: Tensor) -> Tensor:
    """Each patch [..., P] with mean 0 and (unbiased) variance 1 over its own values: MAE's better target."""
    mean, variance = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
    return (patches - mean) / (variance + 1e-6).sqrt()
