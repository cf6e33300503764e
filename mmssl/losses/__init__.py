"""Losses: pure functions from tensors to a scalar.

A loss over pairs takes `world` and returns this rank's share: the mean of the shares over ranks is the loss of the
global batch. A loss over independent items returns (sum, count).
"""

from mmssl.losses.contrastive import SIGLIP_BIAS, SIGLIP_LOG_SCALE, info_nce, moco, nt_xent, siglip
from mmssl.losses.logits import correct_matches
from mmssl.losses.prediction import NO_TARGET, masked_language, masked_patches, next_token, normalise_patches

__all__ = [
    "NO_TARGET",
    "SIGLIP_BIAS",
    "SIGLIP_LOG_SCALE",
    "correct_matches",
    "info_nce",
    "masked_language",
    "masked_patches",
    "moco",
    "next_token",
    "normalise_patches",
    "nt_xent",
    "siglip",
]
