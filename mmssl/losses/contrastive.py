"""Symmetric InfoNCE between images and texts (CLIP, arXiv:2103.00020)."""

from torch import Tensor

from mmssl.losses import blocked
from mmssl.losses.blocked import Form, choose
from mmssl.losses.precision import in_float32
from mmssl.losses.ranks import ALONE, Ranks


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
    texts, offset = ranks.gather(text_features)
    plain = choose(form, len(image_features), len(texts), image_features.device) == "plain"
    logsumexps = _plain_logsumexps if plain else blocked.logsumexps
    by_image, by_text, positives = logsumexps(image_features, texts, logit_scale, offset)
    # A rank knows only its own images' part of each text's sum.
    by_text = ranks.logsumexp(by_text)[offset : offset + len(text_features)]
    return ((by_image - positives) + (by_text - positives)).sum() * (ranks.world / (2 * len(texts)))


def _plain_logsumexps(
    image: Tensor, text: Tensor, scale: Tensor, offset: int
) -> tuple[Tensor, Tensor, Tensor]:
    logits = scale * image @ text.T
    return logits.logsumexp(1), logits.logsumexp(0), logits.diagonal(offset)
