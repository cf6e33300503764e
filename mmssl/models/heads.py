"""Small heads of objectives, and decoders from a tower's tokens to pixels."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp(width: int, hidden: int, dim: int) -> nn.Sequential:
    """Two layers. No batch norm, so that a sample's head output depends on that sample alone."""
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, dim, bias=False))


def unit(x: Tensor) -> Tensor:
    """L2-normalised over the last dimension, in float32."""
    return F.normalize(x.float(), dim=-1)


def patchify(images: Tensor, size: int) -> Tensor:
    """[B, C, H, W] -> [B, N, size * size * C], row by row; a patch's values are ordered by row, column, colour."""
    b, c, h, w = images.shape
    cells = images.reshape(b, c, h // size, size, w // size, size)
    return cells.permute(0, 2, 4, 3, 5, 1).reshape(b, (h // size) * (w // size), size * size * c)


def unpatchify(patches: Tensor, size: int) -> Tensor:
    """The inverse of `patchify` for square images: [B, N, size * size * C] -> [B, C, H, H]."""
    b, n, values = patches.shape
    side = math.isqrt(n)
    cells = patches.reshape(b, side, side, size, size, values // size**2)
    return cells.permute(0, 5, 1, 3, 2, 4).reshape(b, values // size**2, side * size, side * size)


@dataclass(frozen=True)
class DecoderSize:
    """Size of a transformer decoder."""

    width: int
    depth: int
    heads: int


class PatchDecoder(nn.Module):
    """MAE's decoder (He et al. 2021, section 3): a small transformer from tokens to the values of patches.

    Its input is the visible tokens and a learned mask token for every hidden patch, each with its position.
    """

    position: Tensor

    def __init__(
        self, token_width: int, pooled_width: int, grid: tuple[int, int], values: int, size: DecoderSize
    ) -> None:
        super().__init__()
        from timm.layers import build_sincos2d_pos_embed

        self.embed = nn.Linear(token_width, size.width)
        # MAE embeds its class token like the others; a pooled vector of another width needs its own layer.
        self.embed_pooled = None if pooled_width == token_width else nn.Linear(pooled_width, size.width)
        self.mask_token = nn.Parameter(torch.zeros(size.width).normal_(std=0.02))
        self.register_buffer("position", build_sincos2d_pos_embed(list(grid), size.width), persistent=False)
        self.blocks = nn.ModuleList(_block(size) for _ in range(size.depth))
        self.norm = nn.LayerNorm(size.width, eps=1e-6)
        self.predict = nn.Linear(size.width, values)

    def forward(self, tokens: Tensor, pooled: Tensor, keep: Tensor) -> Tensor:
        """Values of all patches, [B, N, values].

        Args:
            tokens: [B, K, token_width] of the visible patches.
            pooled: [B, pooled_width]; for a tower that pools by a class token, MAE's class token.
            keep: int64 [B, K], indices of the visible patches.
        """
        visible = self.embed(tokens)
        index = keep.unsqueeze(-1).expand(-1, -1, visible.shape[-1])
        patches = self.mask_token.to(visible.dtype).expand(len(keep), len(self.position), -1).scatter(1, index, visible)
        embed_pooled = self.embed if self.embed_pooled is None else self.embed_pooled
        first = embed_pooled(pooled).unsqueeze(1)
        x = torch.cat([first, patches + self.position.to(visible.dtype)], 1)
        for block in self.blocks:
            x = block(x)
        values: Tensor = self.predict(self.norm(x[:, 1:]))
        return values


def _block(size: DecoderSize) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(
        size.width,
        size.heads,
        4 * size.width,
        dropout=0.0,
        activation="gelu",
        layer_norm_eps=1e-6,
        batch_first=True,
        norm_first=True,
    )


class PlaceHead(nn.Module):
    """Linear prediction of a square of the image from its token in a grid (SimMIM, Xie et al. 2021)."""

    def __init__(self, token_width: int, places: int, channels: int, side: int) -> None:
        """`side`: height and width of the prediction, `channels`: values per position."""
        super().__init__()
        self.places, self.side = places, side
        self.each = -(-side // places)
        self.predict = nn.Linear(token_width, channels * self.each**2)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, places * places, token_width] -> [B, channels, side, side]."""
        return unpatchify(self.predict(tokens), self.each)[:, :, : self.side, : self.side]
