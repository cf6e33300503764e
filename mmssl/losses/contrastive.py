"""Symmetric InfoNCE between images and texts (CLIP, arXiv:2103.00020)."""

import torch
from torch import Tensor

from mmssl.losses.precision import in_float32
from mmssl.losses.ranks import ALONE, Ranks


@in_float32
def info_nce(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor, *, ranks: Ranks = ALONE
) -> Tensor:
    """This rank's share of the mean over all pairs of -(log p(text | image) + log p(image | text)) / 2.

    `image_features` and `text_features` [n, D] are this rank's pairs, L2-normalised by the caller;
    `logit_scale` is the factor of their products (exp(s), not s), a scalar. The candidates for each image are
    all ranks' texts, and the other way round.
    """
    texts, offset = ranks.gather(text_features)
    rows, columns, positives = _logsumexps(image_features, texts, logit_scale, offset)
    own = slice(offset, offset + len(image_features))
    columns = ranks.logsumexp(columns)[own]
    return ((rows - positives) + (columns - positives)).sum() * (ranks.world / (2 * len(texts)))


def _logsumexps(image: Tensor, text: Tensor, scale: Tensor, offset: int) -> tuple[Tensor, Tensor, Tensor]:
    logits = scale * image @ text.T
    return torch.logsumexp(logits, 1), torch.logsumexp(logits, 0), logits.diagonal(offset)
