"""Pairwise sigmoid loss between images and texts (SigLIP, arXiv:2303.15343)."""

import math

from torch import Tensor

from mmssl.losses.logits import Form, sigmoid_loss
from mmssl.losses.precision import in_float32
from mmssl.losses.ranks import ALONE, Ranks, share

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
    world: Ranks = ALONE,
    form: Form = "auto",
) -> Tensor:
    """This rank's share of the sum over all N x N pairs of -log sigmoid(+-logit), divided by N.

    The sign is + for the N true pairs. `image_features` and `text_features` [n, D] are this rank's pairs,
    L2-normalised by the caller; `logit_scale` (exp(t), not t) and `logit_bias` are scalars. The blocked
    form never holds the matrix of logits.
    """
    total = sigmoid_loss(image_features, text_features, logit_scale, logit_bias, world=world, form=form)
    return share(total, len(image_features), world)
