"""Attention relevance of vision transformers (Chefer, Gur and Wolf 2021, "Generic Attention-model Explainability")."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmssl.errors import UserError
from mmssl.models import DualEncoder


def attention_relevance(encoder: DualEncoder, images: Tensor, texts: Tensor) -> Tensor:
    """Contribution of each patch to the similarity through all attention layers, [B, rows, columns].

    Each layer's attention A, weighted by its gradient, averaged over heads without negative values, updates the
    relevance of every token to every other: R <- R + E_h[(dS/dA * A)+] R, from the identity (equations 5 and 6). The
    map is the class token's row; the mean of the patches' rows if the tower averages patches; or the row of the query
    if a last attention layer pools them.

    Args:
        images: uint8 [B, 3, S, S].
        texts: unit-length embeddings [B, D].

    Raises:
        UserError: the tower's attention cannot be recorded.
    """
    tower = encoder.vision
    if tower.grid is None:
        raise UserError("attention relevance needs a ViT of open_clip or timm; use gradcam or occlusion")
    # A gradient on the images keeps every layer from taking a path without a graph.
    pixels = images.float().requires_grad_()
    with torch.enable_grad(), recorded_attention() as attentions:
        score = (encoder.encode_image(pixels) * texts).sum()
    if not attentions:
        raise UserError("the attention of this tower cannot be recorded; use occlusion")
    gradients = torch.autograd.grad(score, attentions)
    tokens = attentions[0].shape[-1]
    relevance = torch.eye(tokens, device=texts.device).expand(len(images), -1, -1)
    pooled = None
    for attention, gradient in zip(attentions, gradients, strict=True):
        positive = (gradient * attention).detach().clamp(min=0).mean(1)
        if positive.shape[1] == positive.shape[2]:
            relevance = relevance + positive @ relevance
        else:
            pooled = (positive @ relevance).mean(1)
    patches = tower.grid[0] * tower.grid[1]
    if pooled is None:
        pooled = relevance[:, 0] if _class_token(tower.trunk) else relevance[:, -patches:].mean(1)
    return pooled[:, -patches:].reshape(-1, *tower.grid)


@contextmanager
def recorded_attention() -> Iterator[list[Tensor]]:
    """Context in which attention is computed step by step, and its probabilities [B, heads, L, S] are kept with their
    graph. Not thread-safe: torch's function is replaced."""
    kept: list[Tensor] = []
    fused = F.scaled_dot_product_attention

    def attend(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *options: Any, **named: Any
    ) -> Tensor:
        # A tower in evaluation mode uses no dropout and no mask.
        assert attn_mask is None, "vision towers use no mask"
        assert not any((*options, *named.values())), (options, named)
        scores = query @ key.mT * query.shape[-1] ** -0.5
        probabilities = scores.softmax(-1)
        kept.append(probabilities)
        attended: Tensor = probabilities @ value
        return attended

    F.scaled_dot_product_attention = attend
    try:
        yield kept
    finally:
        F.scaled_dot_product_attention = fused


def _class_token(trunk: Any) -> bool:
    return getattr(trunk, "global_pool", getattr(trunk, "pool_type", None)) in ("token", "tok")
