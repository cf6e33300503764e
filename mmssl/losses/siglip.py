"""Pairwise sigmoid loss between images and texts (SigLIP, arXiv:2303.15343)."""

import math

from torch import Tensor
from torch.nn import functional as F

from mmssl.losses.precision import in_float32
from mmssl.losses.ranks import ALONE, Ranks

INITIAL_LOG_SCALE = math.log(10)
"""t at the first step: logits are exp(t) * products + bias."""
INITIAL_BIAS = -10.0
"""At the first step nearly all pairs are negatives; a bias of -10 starts the loss near their prior."""


@in_float32
def siglip(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    ranks: Ranks = ALONE,
) -> Tensor:
    """This rank's share of the sum over all N x N pairs of -log sigmoid(+-logit), divided by N.

    The sign is + for the N true pairs. `image_features` and `text_features` [n, D] are this rank's pairs,
    L2-normalised by the caller; `logit_scale` (exp(t), not t) and `logit_bias` are scalars.
    """
    texts, offset = ranks.gather(text_features)
    logits = logit_scale * image_features @ texts.T + logit_bias
    logits.diagonal(offset).neg_()
    return -F.logsigmoid(-logits).sum() * (ranks.world / len(texts))
