"""Losses: pure functions from tensors to a scalar.

A loss over pairs takes `world` and returns this rank's share: the mean of the shares over ranks is the loss of the
global batch. A loss over independent items returns (sum, count).
"""

from mmssl.losses import distillation, logits, prediction, redundancy
from mmssl.losses.contrastive import SIGLIP_BIAS, SIGLIP_LOG_SCALE, info_nce, moco, nt_xent, siglip
from mmssl.losses.global_contrastive import UNSEEN, global_contrastive

__all__ = [
    "SIGLIP_BIAS",
    "SIGLIP_LOG_SCALE",
    "UNSEEN",
    "distillation",
    "global_contrastive",
    "info_nce",
    "logits",
    "moco",
    "nt_xent",
    "prediction",
    "redundancy",
    "siglip",
]
