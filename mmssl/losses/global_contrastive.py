"""The global contrastive loss: each sample against all samples of the data, by a moving average over batches.

SogCLR (arXiv:2202.12387, algorithm 1; for images and captions: appendix), FastCLIP (arXiv:2407.01445, algorithm 1).
"""

import math

import torch
from torch import Tensor

from mmssl.distributed import SINGLE_PROCESS, World
from mmssl.losses.common import in_float32, share
from mmssl.losses.logits import Form, logsumexps

UNSEEN = -math.inf
"""Estimate of a sample that no batch has had."""


@in_float32
def global_contrastive(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    estimates: Tensor,
    *,
    gamma: float,
    eps: float = 1e-14,
    world: World = SINGLE_PROCESS,
    form: Form = "auto",
) -> tuple[Tensor, Tensor]:
    """This rank's share of the mean over all pairs of (log(eps + u of the image) + log(eps + u of the text)) / 2.

    g of an image is the mean over the other texts of the global batch of exp(logit - logit of its own text), and u its
    moving average u <- (1 - gamma) u + gamma g; the same for a text. The gradient is that of the papers, gradient of
    g / (eps + u): of g alone, not of what u was before.

    `image_features` and `text_features` [n, D] are this rank's pairs, L2-normalised by the caller; `logit_scale`
    multiplies their dot products, a scalar. `estimates` [n, 2] are log u of the images and texts before this batch,
    UNSEEN where there is none: then u is g.

    Returns: the loss, and the new estimates [n, 2] without gradient. One that would not be finite stays as it was.
    """
    by_image, by_text, positives = logsumexps(
        image_features, text_features, logit_scale, world=world, form=form, without_diagonal=True
    )
    others = (world.sum(positives.new_full((), len(positives))) - 1).clamp(min=1)
    log_g = torch.stack([by_image, by_text], 1) - positives[:, None] - others.log()
    with torch.no_grad():
        g = log_g.detach()
        before = math.log1p(-gamma) if gamma < 1 else -math.inf
        mixed = torch.logaddexp(estimates + before, g + math.log(gamma))
        log_u = torch.where(estimates == UNSEEN, g, mixed)
        log_sum = torch.logaddexp(log_u, log_u.new_full((), math.log(eps) if eps > 0 else -math.inf))
        weight = (g - log_sum).exp()
    # The value of the first summand and the gradient of the second, which is zero.
    losses = (log_sum + weight * (log_g - g)).sum(1) / 2
    return share(losses.sum(), len(losses), world), torch.where(g.isfinite(), log_u, estimates)
