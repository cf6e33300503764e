"""Cross-entropy of predicted tokens: masked language modelling (BERT) and captioning (CoCa)."""

from torch import Tensor
from torch.nn import functional as F

from mmssl.losses.precision import in_float32

NO_TARGET = -100
"""Marks a position without a target."""


@in_float32
def masked_language(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over targets of -log p(token), and their count.

    `logits` [..., V]; `targets` int64 [...], `NO_TARGET` where nothing was masked. Cheapest with the masked
    positions alone: the vocabulary is the widest thing in the model.
    """
    total = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=NO_TARGET, reduction="sum")
    return total, (targets != NO_TARGET).sum().to(total.dtype)


@in_float32
def next_token(logits: Tensor, tokens: Tensor, token_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over tokens but the first of -log p(token | earlier ones), and their count.

    `logits` [B, L, V] at each position of the same `tokens` int64 [B, L]: the shift by one happens here.
    `token_mask` bool [B, L] is False at padding, which is no target.
    """
    return masked_language(logits[:, :-1], tokens[:, 1:].masked_fill(~token_mask[:, 1:], NO_TARGET))
