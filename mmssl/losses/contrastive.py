"""Symmetric InfoNCE between images and texts (CLIP, arXiv:2103.00020).

NT-Xent between two views of the same things (SimCLR, arXiv:2002.05709, equation 1 and algorithm 1).
InfoNCE of queries against a queue of earlier keys (MoCo, arXiv:1911.05722, algorithm 1).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from mmssl.losses.logits import Form, logsumexps
from mmssl.losses.precision import in_float32
from mmssl.losses.ranks import ALONE, Ranks, share


@in_float32
def info_nce(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    *,
    world: Ranks = ALONE,
    form: Form = "auto",
) -> Tensor:
    """This rank's share of the mean over all pairs of -(log p(text | image) + log p(image | text)) / 2.

    `image_features` and `text_features` [n, D] are this rank's pairs, L2-normalised by the caller;
    `logit_scale` is the factor of their products (exp(s), not s), a scalar. The candidates for each image are
    all ranks' texts, and the other way round. The blocked form never holds the matrix of logits.
    """
    by_image, by_text, positives = logsumexps(image_features, text_features, logit_scale, world=world, form=form)
    losses = ((by_image - positives) + (by_text - positives)) / 2
    return share(losses.sum(), len(losses), world)


@in_float32
def nt_xent(
    first: Tensor, second: Tensor, temperature: float = 0.1, *, world: Ranks = ALONE, form: Form = "auto"
) -> Tensor:
    """This rank's share of the mean over all 2N views of -log p(the other view of the same thing).

    `first` and `second` [n, D] are this rank's two views, L2-normalised by the caller. The candidates for a
    view are all ranks' other 2N - 1 views.
    """
    scale = first.new_full((), 1 / temperature)
    to_second, to_first, positives = logsumexps(first, second, scale, world=world, form=form)
    among_first, _, _ = logsumexps(first, first, scale, world=world, form=form, without_diagonal=True)
    among_second, _, _ = logsumexps(second, second, scale, world=world, form=form, without_diagonal=True)
    of_first = to_second.logaddexp(among_first) - positives
    of_second = to_first.logaddexp(among_second) - positives
    return share((of_first + of_second).sum() / 2, len(positives), world)


@in_float32
def moco(query: Tensor, key: Tensor, queue: Tensor, temperature: float = 0.2) -> tuple[Tensor, Tensor]:
    """Sum over queries of -log p(own key | own key and the queue), and their count.

    `query` and `key` [n, D] and `queue` [K, D] are L2-normalised by the caller. Only queries get gradients.
    """
    positive = (query * key.detach()).sum(1, keepdim=True)
    logits = torch.cat([positive, query @ queue.detach().T], 1) / temperature
    own = torch.zeros(len(query), dtype=torch.int64, device=query.device)
    return F.cross_entropy(logits, own, reduction="sum"), logits.new_full((), len(query))
