"""Losses that compare each sample with all others of the global batch, and MoCo's loss against a queue.

InfoNCE (CLIP, arXiv:2103.00020), with several positives (SupCon, arXiv:2004.11362, equation 2; UniCL, arXiv:2204.03610,
equation 3), sigmoid loss (SigLIP, arXiv:2303.15343), NT-Xent (SimCLR, arXiv:2002.05709, equation 1 and algorithm 1),
MoCo (arXiv:1911.05722, algorithm 1).
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from mmssl.distributed import SINGLE_PROCESS, World
from mmssl.losses.common import in_float32, share
from mmssl.losses.logits import Form, logsumexps, sigmoid_loss
from mmssl.losses.pairing import group_sizes
from mmssl.types import Groups

SIGLIP_LOG_SCALE = math.log(10)
"""SigLIP's t at the first step: the scale is exp(t)."""
SIGLIP_BIAS = -10.0
"""SigLIP's bias at the first step. Nearly all pairs are negatives, and with this bias the loss starts low."""


@in_float32
def info_nce(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    *,
    world: World = SINGLE_PROCESS,
    form: Form = "auto",
    groups: Groups | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """This rank's share of the mean over all pairs of -(log p(text | image) + log p(image | text)) / 2.

    `image_features` and `text_features` [n, D] are this rank's pairs, L2-normalised by the caller;
    `logit_scale` multiplies their dot products (exp(s), not s), a scalar. The candidates for each image are
    all ranks' texts, and vice versa.

    With `groups`, log p is the mean over all positives of an image or text (UniCL), and there may be m texts for n
    images. `label_smoothing` is the weight of the mean of log p over all candidates, as in F.cross_entropy; it needs
    groups that leave no pair out.
    """
    by_image, by_text, positives = logsumexps(
        image_features, text_features, logit_scale, world=world, form=form, groups=groups
    )
    if groups is None:
        losses = ((by_image - (1 - label_smoothing) * positives) + (by_text - (1 - label_smoothing) * positives)) / 2
        loss = share(losses.sum(), len(losses), world)
    else:
        images, texts = (world.gather(side[:, 0].contiguous())[0] for side in (groups.left, groups.right))
        own = groups.left[:, 0].contiguous()
        # Each positive pair counts once for its image and once for its text.
        of_image, of_text = (group_sizes(own, everyone).to(positives.dtype) for everyone in (texts, images))
        weight = 1 / (of_image * len(images)) + 1 / (of_text * len(texts))
        summed = (1 - label_smoothing) * world.size * (weight * positives).sum()
        loss = (share(by_image.sum(), len(by_image), world) + share(by_text.sum(), len(by_text), world) - summed) / 2
    if label_smoothing == 0:
        return loss
    mean_text = _mean_of_all(text_features, world)
    return loss - label_smoothing * logit_scale * share(image_features.sum(0) @ mean_text, len(image_features), world)


def _mean_of_all(features: Tensor, world: World) -> Tensor:
    """The mean [D] of all ranks' features [n, D]. Differentiable; a vector of each rank travels."""
    count = world.sum(features.new_full((), len(features)))
    return world.gather(features.sum(0, keepdim=True))[0].sum(0) / count


@in_float32
def siglip(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    world: World = SINGLE_PROCESS,
    form: Form = "auto",
    groups: Groups | None = None,
) -> Tensor:
    """This rank's share of the sum over all N x N pairs of -log sigmoid(+-logit), divided by N.

    The sign is + for the N true pairs. With `groups` it is + for all pairs of one group, the sum is divided by their
    number, and there may be m texts for n images. `image_features` and `text_features` [n, D] are this rank's pairs,
    L2-normalised by the caller; `logit_scale` (exp(t), not t) and `logit_bias` are scalars.
    """
    total = sigmoid_loss(image_features, text_features, logit_scale, logit_bias, world=world, form=form, groups=groups)
    if groups is None:
        return share(total, len(image_features), world)
    texts, _ = world.gather(groups.right[:, 0].contiguous())
    positives = group_sizes(groups.left[:, 0].contiguous(), texts).sum()
    return share(total, positives.to(total.dtype), world)


@in_float32
def nt_xent(
    first: Tensor, second: Tensor, temperature: float = 0.1, *, world: World = SINGLE_PROCESS, form: Form = "auto"
) -> Tensor:
    """This rank's share of the mean over all 2N views of -log p(the other view of the same sample).

    `first` and `second` [n, D] are this rank's two views, L2-normalised by the caller. The candidates for a
    view are all ranks' other 2N - 1 views.
    """
    scale = first.new_full((), 1 / temperature)
    to_second, to_first, positives = logsumexps(first, second, scale, world=world, form=form)
    among_first, _, _ = logsumexps(first, first, scale, world=world, form=form, without_diagonal=True)
    among_second, _, _ = logsumexps(second, second, scale, world=world, form=form, without_diagonal=True)
    first_losses = to_second.logaddexp(among_first) - positives
    second_losses = to_first.logaddexp(among_second) - positives
    return share((first_losses + second_losses).sum() / 2, len(positives), world)


@in_float32
def moco(query: Tensor, key: Tensor, queue: Tensor, temperature: float = 0.2) -> tuple[Tensor, Tensor]:
    """Sum over queries of -log p(own key | own key and the queue), and their count.

    `query` and `key` [n, D] and `queue` [K, D] are L2-normalised by the caller. Only queries get gradients.
    """
    positive = (query * key.detach()).sum(1, keepdim=True)
    logits = torch.cat([positive, query @ queue.detach().T], 1) / temperature
    own = torch.zeros(len(query), dtype=torch.int64, device=query.device)
    return F.cross_entropy(logits, own, reduction="sum"), logits.new_full((), len(query))
