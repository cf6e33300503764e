"""Vision towers of open_clip and timm with one interface: uint8 images -> one vector and patch tokens."""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmssl.config import VisionConfig
from mmssl.errors import UserError, one_line

_ONEDNN_BLOCK = 16
"""Channels of a block of oneDNN: 16 with AVX-512, 8 with AVX2."""


@dataclass(frozen=True)
class Encoded:
    """The output of a tower for B inputs."""

    pooled: Tensor
    """One vector per input, [B, width]."""
    tokens: Tensor | None
    """One vector per patch, position of a feature map or text token, [B, T, token_width]; None if the tower has
    no tokens."""


def open_clip_class(module: str, name: str) -> Any:
    """A class of open_clip for `isinstance`; an empty tuple while open_clip, which takes seconds, is not imported."""
    imported = sys.modules.get(f"open_clip.{module}")
    return () if imported is None else getattr(imported, name)


class PatchSelect(nn.Module):
    """Replacement for a ViT's patch dropout, after the position embedding. It keeps the patches listed in `keep`.

    Without `keep`, the ViT's own dropout acts in training.
    """

    def __init__(self, prefix: int, dropout: nn.Module | None = None, with_indices: bool = False) -> None:
        """`with_indices`: the ViT expects the kept patches too, because it rotates by position in every block."""
        super().__init__()
        self.prefix = prefix
        self.dropout = dropout
        self.with_indices = with_indices
        self.keep: Tensor | None = None

    def forward(self, x: Tensor) -> Any:
        if self.keep is None:
            if self.dropout is not None:
                return self.dropout(x)
            return (x, None) if self.with_indices else x
        index = self.keep.unsqueeze(-1).expand(-1, -1, x.shape[-1])
        kept = torch.cat([x[:, : self.prefix], x[:, self.prefix :].gather(1, index)], dim=1)
        return (kept, self.keep) if self.with_indices else kept


class VisionTower(nn.Module):
    """A library's trunk with its normalisation and, for ViTs, access to patches.

    What a trunk can do is measured with one image, not taken from its class.

    Attributes:
        width: size of the pooled vector.
        token_width: size of each token's vector; None if the tower has no tokens.
        places: tokens per column and row of the image; None if the tower has no tokens.
        image_size: side of the square input in pixels.
        grid: patches per column and row; None if the tower cannot encode a subset of its patches.
        patch_size: side in pixels of the square that a patch token stands for.
        projects: the trunk ends in its own projection to the shared space (attention pooling of CLIP's ResNets).
        drops_patches: the trunk leaves out patches at random in training (`patch_dropout`).
        statistics: mean and standard deviation of colours that the trunk expects, on a scale of 0 to 1.
    """

    mean: Tensor
    std: Tensor
    trunk: Any

    def __init__(self, trunk: nn.Module, image_size: int, mean: Any, std: Any, projects: bool = False) -> None:
        """Measure the trunk.

        Raises:
            UserError: it cannot encode an image of this size.
        """
        super().__init__()
        subsample_first(trunk)
        self.trunk = trunk
        self.image_size = image_size
        self.projects = projects
        self.statistics = (_three(mean), _three(std))
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1) * 255, persistent=False)
        self._is_vit = isinstance(trunk, open_clip_class("transformer", "VisionTransformer"))
        self._is_resnet = isinstance(trunk, open_clip_class("modified_resnet", "ModifiedResNet"))
        self._by_parts = hasattr(trunk, "forward_features") and hasattr(trunk, "forward_head")
        self.select: PatchSelect | None = None
        self.grid: tuple[int, int] | None = None
        self.patch_size: int | None = None
        dropouts = (m for m in trunk.modules() if type(m).__name__.startswith("PatchDropout"))
        self.drops_patches = any(float(getattr(m, "prob", 0)) > 0 for m in dropouts)
        self._locked = False
        self.width, self.token_width, self.places = self._measure()

    def _measure(self) -> tuple[int, int | None, int | None]:
        """Width, width of tokens and their number per side. Settles how to call the trunk and if it selects patches."""
        image = torch.zeros(1, 3, self.image_size, self.image_size, dtype=torch.uint8)
        with still(self.trunk), torch.no_grad():
            try:
                probe = self(image)
            except Exception as error:  # trunks raise many kinds: a size that does not fit, parts in another form
                probe = self._whole(image, error)
            self.select, self.grid, self.patch_size = self._patch_access(image, probe.tokens)
        width = probe.pooled.shape[-1]
        if probe.tokens is None:
            return width, None, None
        return width, probe.tokens.shape[-1], math.isqrt(probe.tokens.shape[1])

    def _whole(self, image: Tensor, error: Exception) -> Encoded:
        """The image encoded by the trunk as a whole, which then has no tokens."""
        if self._by_parts:
            self._by_parts = False
            try:
                return self._encode(self.normalize(image))
            except Exception as second:
                error = second
        side, kind = self.image_size, type(self.trunk).__name__
        raise UserError(
            f"model.vision: the tower ({kind}) cannot encode images of {side} x {side} pixels: {one_line(error, 200)}; "
            f"set another model.vision.image_size"
        ) from error

    def _patch_access(
        self, image: Tensor, tokens: Tensor | None
    ) -> tuple[PatchSelect | None, tuple[int, int] | None, int | None]:
        """The selection of patches with their grid and size, if the trunk encodes one half of its patches as told."""
        select = next((m for m in self.trunk.modules() if isinstance(m, PatchSelect)), None)
        if select is None:
            return None, None, None
        grid, patch_size = _patch_grid(self.trunk)
        if grid is not None and patch_size is not None and tokens is not None and grid[0] * grid[1] == tokens.shape[1]:
            self.select = select
            if self._selects(image, grid, patch_size):
                return select, grid, patch_size
        _restore_dropout(self.trunk, select)
        return None, None, None

    def _selects(self, image: Tensor, grid: tuple[int, int], patch_size: int) -> bool:
        """True if the trunk encodes the upper half of the patches, and nothing of the pixels below."""
        rows, columns = grid
        kept = (rows + 1) // 2 * columns
        below = image.clone()
        below[..., kept // columns * patch_size :, :] = 255
        keep = torch.arange(kept).unsqueeze(0)
        try:
            some, other = self(image, keep), self(below, keep)
        except Exception:  # whatever a trunk raises that does not drop patches in this way
            return False
        assert some.tokens is not None
        assert other.tokens is not None
        # A convolutional stem mixes patches.
        return some.tokens.shape[1] == kept and torch.allclose(some.tokens, other.tokens, rtol=1e-4, atol=1e-5)

    def normalize(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W], uint8 or float in 0..255, with zero mean and unit standard deviation."""
        return (images.to(self.mean.dtype) - self.mean) / self.std

    def denormalize(self, images: Tensor) -> Tensor:
        """The inverse of `normalize`, rounded to uint8."""
        return (images.float() * self.std + self.mean).round().clamp(0, 255).to(torch.uint8)

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Encoded:
        """Encode images.

        Args:
            images: uint8 [B, 3, image_size, image_size] (or float in 0..255).
            keep: int64 [B, K], the patches (row-major) the tower sees; None: all of them.

        Raises:
            UserError: `keep` is given and the tower cannot encode a subset of patches; or floats are not pixels in
                0..255.
        """
        self._refuse_normalised(images)
        x = self.normalize(images).contiguous(memory_format=torch.channels_last)
        if keep is None:
            return self._encode(x)
        if self.select is None:
            raise UserError("this vision tower cannot encode a subset of patches; use a ViT of open_clip or timm")
        self.select.keep = keep
        try:
            return self._encode(x)
        finally:
            self.select.keep = None

    def _refuse_normalised(self, images: Tensor) -> None:
        """Raises UserError for floats from 0 to 1 or with a mean of zero, which would be taken for a black image.

        Looked at outside of training only: on a GPU it waits for the pixels.
        """
        symbolic = torch.compiler.is_compiling() or images.is_meta
        if self.training or not images.is_floating_point() or images.requires_grad or symbolic:
            return
        low, high = (float(value) for value in images.detach().aminmax())
        if low < 0 or 0 < high <= 1:
            raise UserError(
                f"the vision tower takes uint8 pixels, or floats in 0..255, and normalises them by itself; these are "
                f"floats from {low:.3g} to {high:.3g}: give the pixels before normalisation (x 255)"
            )

    def _encode(self, x: Tensor) -> Encoded:
        if self._is_vit and self.trunk.attn_pool is not None:
            # Its own tokens are those of the pooling queries, not of patches.
            hidden = self.trunk.transformer(self.trunk._embeds(x))
            return Encoded(self.trunk._pool(hidden)[0], hidden[:, 1:])
        if self._is_vit:
            pooled, tokens = self.trunk(x)
            return Encoded(pooled, tokens)
        if self._is_resnet:
            features = self.trunk.stem(x)
            for stage in (self.trunk.layer1, self.trunk.layer2, self.trunk.layer3, self.trunk.layer4):
                features = stage(features)
            return Encoded(self.trunk.attnpool(features), features.flatten(2).mT)
        if not self._by_parts:
            return Encoded(self.trunk(x), None)
        features = self.trunk.forward_features(x)
        pooled = self.trunk.forward_head(features, pre_logits=not self.projects)
        return Encoded(pooled, self._tokens(features))

    def _tokens(self, features: Tensor) -> Tensor | None:
        """The tokens [B, T, token_width] in a timm trunk's features: of patches, or of places of a feature map."""
        if features.ndim == 4:
            # Convolutional towers keep channels second, window transformers (Swin) last.
            channels_last = features.shape[-1] == self.trunk.num_features != features.shape[1]
            return features.flatten(1, 2) if channels_last else features.flatten(2).mT
        if features.ndim != 3 or not hasattr(self.trunk, "num_prefix_tokens"):
            return None
        tokens = features[:, self.trunk.num_prefix_tokens :]
        count = tokens.shape[1]
        chosen = self.select is not None and self.select.keep is not None
        return tokens if chosen or self.drops_patches or count == math.isqrt(count) ** 2 > 0 else None

    def to_config(self, config: VisionConfig) -> VisionConfig:
        """The configuration that builds a tower of this architecture, with random weights; `config` built this one."""
        mean, std = self.statistics
        own = {"pretrained": None, "lock": False, "unlocked_layers": 0, "image_size": self.image_size}
        return config.model_copy(update={**own, "mean": mean, "std": std})

    def checkpoint_activations(self) -> None:
        """Discard activations inside blocks in training and recompute them in the backward pass.

        Raises:
            UserError: the library's tower does not support this.
        """
        try:
            self.trunk.set_grad_checkpointing(True)
        except (AttributeError, AssertionError, ValueError, NotImplementedError) as error:
            kind = type(self.trunk).__name__
            raise UserError(
                f"train.activation_checkpointing: this vision tower ({kind}) does not support it; set it to false"
            ) from error

    def lock(self, unlocked_layers: int = 0) -> None:
        """Freeze everything before the last `unlocked_layers` blocks; with more than there are, nothing is frozen."""
        self.requires_grad_(False)
        self._locked = True
        if unlocked_layers > 0:
            for parameter in _last_layers(self.trunk, unlocked_layers):
                parameter.requires_grad_(True)
        self.train(self.training)

    def train(self, mode: bool = True) -> "VisionTower":
        """As nn.Module.train, but locked modules stay in evaluation mode, so batch norms keep their statistics.

        The dropout of LoRA adapters stays active.
        """
        super().train(mode)
        if self._locked and mode:
            for name, module in self.trunk.named_modules():
                own = list(module.parameters())
                if not any(p.requires_grad for p in own) and "lora_dropout" not in name:
                    module.training = False
        return self


def subsample_first(trunk: nn.Module) -> None:
    """Rebuild convolutions of 1 x 1 with a stride on few channels in place, in a form that is safe on CPUs.

    oneDNN, as torch 2.15 has it, writes beyond its memory in the gradient of their weights, if the image is in
    channels-last order and has fewer channels than a block. The stems of FastViT, MobileCLIP, MobileOne and RepVGG have
    such a convolution. Every stride-th pixel first, then the convolution without a stride, is the same function. Names
    and shapes of weights stay.
    """
    for module in trunk.modules():
        if not isinstance(module, nn.Conv2d) or module.kernel_size != (1, 1) or max(module.stride) == 1:
            continue
        if module.in_channels < _ONEDNN_BLOCK and module.padding in ((0, 0), "valid"):
            module.register_forward_pre_hook(_Every(*module.stride))
            module.stride = (1, 1)


class _Every:
    """Hook that keeps the pixels that a stride visits."""

    def __init__(self, rows: int, columns: int) -> None:
        self.rows, self.columns = rows, columns

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
        return (inputs[0][..., :: self.rows, :: self.columns], *inputs[1:])


@contextmanager
def still(module: nn.Module) -> Iterator[None]:
    """Evaluation mode. Afterwards the modes of all parts and torch's generators are as they were."""
    modes = [(part, part.training) for part in module.modules()]
    device = next(iter(module.parameters())).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for part, _ in modes:
            part.training = False
        try:
            yield
        finally:
            for part, training in modes:
                part.training = training


def _three(values: Any) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def _patch_grid(trunk: Any) -> tuple[tuple[int, int] | None, int | None]:
    """Patches per column and row, and the side of a patch in pixels."""
    if isinstance(trunk, open_clip_class("transformer", "VisionTransformer")):
        return tuple(trunk.grid_size), trunk.patch_size[0]
    embed: Any = getattr(trunk, "patch_embed", None)
    if getattr(embed, "grid_size", None) is None:
        return None, None
    side = embed.feat_ratio() if hasattr(embed, "feat_ratio") else embed.patch_size
    return tuple(embed.grid_size), int(side if isinstance(side, int) else side[0])


def _restore_dropout(trunk: Any, select: PatchSelect) -> None:
    """Put a trunk's own patch dropout back."""
    for module in trunk.modules():
        for name, child in list(module.named_children()):
            if child is select:
                setattr(module, name, select.dropout)


def _last_layers(trunk: Any, count: int) -> list[nn.Parameter]:
    if isinstance(trunk, open_clip_class("timm_model", "TimmModel")):
        return [*_last_layers(trunk.trunk, count), *trunk.head.parameters()]
    if isinstance(trunk, open_clip_class("modified_resnet", "ModifiedResNet")):
        stages = [trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4]
        return _unlocked(trunk, stages, count, [trunk.attnpool])
    if isinstance(trunk, open_clip_class("transformer", "VisionTransformer")):
        ends = [trunk.ln_post, *(m for m in (trunk.attn_pool, getattr(trunk, "attn_pool_contrastive", None)) if m)]
        return _unlocked(trunk, list(trunk.transformer.resblocks), count, ends)
    if not hasattr(trunk, "group_matcher"):
        raise UserError("model.vision.unlocked_layers: this tower cannot be unlocked by layers; set it to 0")
    from timm.models import group_parameters

    groups = group_parameters(trunk, trunk.group_matcher(coarse=False))
    last = sorted(groups)[-count:]
    return [trunk.get_parameter(name) for group in last for name in groups[group]]


def _unlocked(trunk: nn.Module, blocks: list[Any], count: int, ends: list[Any]) -> list[nn.Parameter]:
    """Weights of the last `count` blocks and of the modules after them; all weights if there are fewer blocks."""
    if count > len(blocks):
        return list(trunk.parameters())
    return [parameter for module in [*blocks[-count:], *ends] for parameter in module.parameters()]
