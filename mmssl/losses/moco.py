"""InfoNCE of queries against a queue of earlier keys (MoCo, arXiv:1911.05722, algorithm 1)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from mmssl.losses.precision import in_float32


@in_float32
def moco(query: Tensor, key: Tensor, queue: Tensor, temperature: float = 0.2) -> tuple[Tensor, Tensor]:
    """Sum over queries of -log p(own key | own key and the queue), and their count.

    `query` and `key` [n, D] and `queue` [K, D] are L2-normalised by the caller. Only queries get gradients.
    """
    positive = (query * key.detach()).sum(1, keepdim=True)
    logits = torch.cat([positive, query @ queue.detach().T], 1) / temperature
    own = torch.zeros(len(query), dtype=torch.int64, device=query.device)
    return F.cross_entropy(logits, own, reduction="sum"), logits.new_full((), len(query))
