"""Symmetric InfoNCE between images and texts (CLIP, arXiv:2103.00020)."""

from torch import Tensor

from mmssl.losses.logits import Form, logsumexps
from mmssl.losses.precision import in_float32
from mmssl.losses.ranks import ALONE, Ranks, share


@in_float32
def info_nce(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    *,
    ranks: Ranks = ALONE,
    form: Form = "auto",
) -> Tensor:
    """This rank's share of the mean over all pairs of -(log p(text | image) + log p(image | text)) / 2.

    `image_features` and `text_features` [n, D] are this rank's pairs, L2-normalised by the caller;
    `logit_scale` is the factor of their products (exp(s), not s), a scalar. The candidates for each image are
    all ranks' texts, and the other way round. The blocked form never holds the matrix of logits.
    """
    by_image, by_text, positives = logsumexps(image_features, text_features, logit_scale, ranks=ranks, form=form)
    losses = ((by_image - positives) + (by_text - positives)) / 2
    return share(losses.sum(), len(losses), ranks)
