"""Pairwise sigmoid loss between images and texts (SigLIP, arXiv:2303.15343)."""

import math

from torch import Tensor
from torch.nn import functional as F

from mmssl.losses import blocked
from mmssl.losses.blocked import Form, choose
from mmssl.losses.precision import in_float32
from mmssl.losses.ranks import ALONE, Ranks

INITIAL_LOG_SCALE = math.log(10)
"""t at the first step: the scale is exp(t)."""
INITIAL_BIAS = -10.0
"""Nearly all pairs are negatives: with this bias the loss starts near what their number says."""


@in_float32
def siglip(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    ranks: Ranks = ALONE,
    form: Form = "auto",
) -> Tensor:
    """This rank's share of the sum over all N x N pairs of -log sigmoid(+-logit), divided by N.

    The sign is + for the N true pairs. `image_features` and `text_features` [n, D] are this rank's pairs,
    L2-normalised by the caller; `logit_scale` (exp(t), not t) and `logit_bias` are scalars. The blocked
    form never holds the matrix of logits.
    """
    texts, offset = ranks.gather(text_features)
    plain = choose(form, len(image_features), len(texts), image_features.device) == "plain"
    total = _plain_sigmoid_loss if plain else blocked.sigmoid_loss
    return total(image_features, texts, logit_scale, logit_bias, offset) * (ranks.world / len(texts))


def _plain_sigmoid_loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, offset: int) -> Tensor:
    logits = scale * image @ text.T + bias
    logits.diagonal(offset).neg_()
    return F.softplus(logits, threshold=50).sum()
