"""Vision towers of open_clip and timm with one interface: uint8 images -> one vector and patch tokens."""

import math
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmssl.errors import UserError


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
    """Replacement for a ViT's patch dropout, after the position embedding. It keeps the patches listed in `keep`."""

    def __init__(self, prefix: int) -> None:
        super().__init__()
        self.prefix = prefix
        self.keep: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.keep is None:
            return x
        index = self.keep.unsqueeze(-1).expand(-1, -1, x.shape[-1])
        return torch.cat([x[:, : self.prefix], x[:, self.prefix :].gather(1, index)], dim=1)


class VisionTower(nn.Module):
    """A library's trunk with its normalisation and, for ViTs, access to patches.

    Attributes:
        width: size of the pooled vector.
        token_width: size of each token's vector; None if the tower has no tokens.
        places: tokens per column and row of the image; None if the tower has no tokens.
        image_size: side of the square input in pixels.
        grid: patches per column and row; None if the tower cannot encode a subset of its patches.
        projects: the trunk ends in its own projection to the shared space (attention pooling of CLIP's ResNets).
        statistics: mean and standard deviation of colours that the trunk expects, on a scale of 0 to 1.
    """

    mean: Tensor
    std: Tensor
    trunk: Any

    def __init__(self, trunk: nn.Module, image_size: int, mean: Any, std: Any, projects: bool = False) -> None:
        super().__init__()
        self.trunk = trunk
        self.image_size = image_size
        self.projects = projects
        self.statistics = (_three(mean), _three(std))
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1) * 255, persistent=False)
        self._is_vit = isinstance(trunk, open_clip_class("transformer", "VisionTransformer"))
        self._is_resnet = isinstance(trunk, open_clip_class("modified_resnet", "ModifiedResNet"))
        self.select, self.grid, self.patch_size = _patch_access(trunk)
        self._locked = False
        was_training = trunk.training
        trunk.eval()
        with torch.no_grad():
            probe = self(torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8))
        trunk.train(was_training)
        self.width = probe.pooled.shape[-1]
        self.token_width = None if probe.tokens is None else probe.tokens.shape[-1]
        self.places = None if probe.tokens is None else math.isqrt(probe.tokens.shape[1])

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
            UserError: `keep` is given and the tower cannot encode a subset of patches.
        """
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

    def _encode(self, x: Tensor) -> Encoded:
        if self._is_vit:
            pooled, tokens = self.trunk(x)
            return Encoded(pooled, tokens)
        if self._is_resnet:
            features = self.trunk.stem(x)
            for stage in (self.trunk.layer1, self.trunk.layer2, self.trunk.layer3, self.trunk.layer4):
                features = stage(features)
            return Encoded(self.trunk.attnpool(features), features.flatten(2).mT)
        if self.projects:
            return Encoded(self.trunk(x), None)
        features = self.trunk.forward_features(x)
        pooled = self.trunk.forward_head(features, pre_logits=True)
        if features.ndim == 3 and self.grid is not None:
            return Encoded(pooled, features[:, self.trunk.num_prefix_tokens :])
        if features.ndim == 4:
            # Convolutional towers keep channels second, window transformers (Swin) last.
            channels_last = features.shape[-1] == self.trunk.num_features != features.shape[1]
            return Encoded(pooled, features.flatten(1, 2) if channels_last else features.flatten(2).mT)
        return Encoded(pooled, None)

    def checkpoint_activations(self) -> None:
        """Discard activations inside blocks in training and recompute them in the backward pass.

        Raises:
            UserError: the library's tower does not support this.
        """
        if not hasattr(self.trunk, "set_grad_checkpointing"):
            raise UserError("train.activation_checkpointing: this vision tower does not support it; set it to false")
        self.trunk.set_grad_checkpointing(True)

    def lock(self, unlocked_layers: int = 0) -> None:
        """Freeze everything before the last `unlocked_layers` blocks."""
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


def _three(values: Any) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def _patch_access(trunk: nn.Module) -> tuple[PatchSelect | None, tuple[int, int] | None, int | None]:
    select = next((m for m in trunk.modules() if isinstance(m, PatchSelect)), None)
    if isinstance(trunk, open_clip_class("transformer", "VisionTransformer")):
        return select, tuple(trunk.grid_size), trunk.patch_size[0]
    embed: Any = getattr(trunk, "patch_embed", None)
    if select is not None and getattr(embed, "grid_size", None) is not None:
        return select, tuple(embed.grid_size), embed.patch_size[0]
    return None, None, None


def _last_layers(trunk: Any, count: int) -> list[nn.Parameter]:
    if isinstance(trunk, open_clip_class("transformer", "VisionTransformer")):
        modules: list[nn.Module] = [*trunk.transformer.resblocks[-count:], trunk.ln_post]
        if trunk.attn_pool is not None:
            modules.append(trunk.attn_pool)
        return [p for m in modules for p in m.parameters()]
    if not hasattr(trunk, "group_matcher"):
        raise UserError("model.vision.unlocked_layers: this tower cannot be unlocked by layers; set it to 0")
    from timm.models import group_parameters

    groups = group_parameters(trunk, trunk.group_matcher(coarse=False))
    last = sorted(groups)[-count:]
    return [trunk.get_parameter(name) for group in last for name in groups[group]]
