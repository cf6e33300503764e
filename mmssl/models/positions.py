"""Learned positions of text encoders: how many tokens they allow, and more of them by interpolation."""

from typing import Any

import torch
from torch import Tensor, nn

from mmssl.models.text_open_clip import OpenClipText

KEPT = 20
"""Positions that stretching leaves as they are: those that CLIP's captions trained best (Long-CLIP)."""


def positions(encoder: Any) -> int | None:
    """Length of the longest caption that the positions allow; None without a limit."""
    limit = getattr(encoder.config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    tables = [m for n, m in encoder.named_modules() if "position" in n and getattr(m, "padding_idx", None) is not None]
    skipped = [table.padding_idx + 1 for table in tables if len(getattr(table, "weight", ())) == limit]
    return limit - max(skipped, default=0)


def stretched(table: Tensor, length: int) -> Tensor:
    """Position embeddings [length, W] from a shorter table [P, W], as in Long-CLIP (Zhang et al. 2024, section 3.2).

    The first KEPT stay. The others are interpolated at steps of (P - KEPT) / (length - KEPT) positions; those beyond
    the last position continue the line through the last two.
    """
    last = len(table) - 1
    kept = min(KEPT, last - 1)
    places = kept + torch.arange(length - kept, dtype=torch.float64) * ((last + 1 - kept) / (length - kept))
    left = places.floor().long().clamp(max=last - 1)
    fraction = (places - left).unsqueeze(1)
    exact = table.detach().double()
    further = exact[left] + fraction * (exact[left + 1] - exact[left])
    return torch.cat([table[:kept].detach(), further.to(table.dtype)])


def stretch(encoder: Any, length: int) -> bool:
    """Give an encoder `length` positions, in place. False, and no change, without a table of learned positions."""
    if isinstance(encoder, OpenClipText):
        encoder.lengthen(stretched(encoder.model.positional_embedding, length))
        return True
    usable, limit = positions(encoder), encoder.config.max_position_embeddings
    assert usable is not None
    table = _learned_table(encoder, usable)
    if table is None:
        return False
    # RoBERTa's and BART's families have two rows before that of the first token.
    before = len(table.weight) - usable
    weight = torch.cat([table.weight[:before].detach(), stretched(table.weight[before:], length)])
    table.weight, table.num_embeddings = nn.Parameter(weight), len(weight)
    longest = limit + length - usable
    for module in encoder.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.dtype == torch.int64 and tuple(buffer.shape) == (1, limit):  # numbers of positions, or segments
                numbers = torch.arange(longest).unsqueeze(0)
                counts = torch.equal(buffer, numbers[:, :limit])
                setattr(module, name, numbers if counts else torch.zeros_like(numbers))
    encoder.config.max_position_embeddings = longest
    return True


def _learned_table(encoder: Any, usable: int) -> nn.Embedding | None:
    """The table of learned positions, with at most two rows more than captions use; None unless there is one."""
    words = encoder.get_input_embeddings()
    found = [
        module
        for name, module in encoder.named_modules()
        if isinstance(module, nn.Embedding)
        and module is not words
        and module.weight.requires_grad  # fixed sinusoids are not learned
        and ("position" in name or name.rpartition(".")[2] == "wpe")
        and 0 <= len(module.weight) - usable <= 2
    ]
    return found[0] if len(found) == 1 else None
