"""The dual encoder: two towers, their projections to a shared space, and the temperature."""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.config import ModelConfig, TextConfig, VisionConfig
from mmssl.errors import UserError
from mmssl.models.text import TextTower
from mmssl.models.text_factory import build_text
from mmssl.models.vision import VisionTower
from mmssl.models.vision_factory import build_vision
from mmssl.precision import Precision, autocast


class DualEncoder(nn.Module):
    """Images and captions in one space of `embed_dim` dimensions, as CLIP (Radford et al. 2021)."""

    def __init__(
        self,
        vision: VisionTower,
        text: TextTower,
        image_projection: nn.Module,
        text_projection: nn.Module,
        embed_dim: int,
        init_temperature: float,
        max_logit_scale: float,
    ) -> None:
        super().__init__()
        self.vision = vision
        self.text = text
        self.image_projection = image_projection
        self.text_projection = text_projection
        self.embed_dim = embed_dim
        self.log_logit_scale = nn.Parameter(torch.tensor(math.log(1 / init_temperature)))
        self.max_log_logit_scale = math.log(max_logit_scale)

    def encode_image(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] -> unit-length embeddings [B, embed_dim]."""
        return self.project_image(self.vision(images).pooled)

    def encode_patches(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] -> unit-length embeddings of patches [B, rows, columns, embed_dim].

        Raises:
            UserError: the vision tower shows no patches.
        """
        from mmssl.models.patches import patch_features  # a training does not load it

        return self.project_image(patch_features(self.vision, images))

    def encode_text(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Token ids and mask [B, L] -> unit-length embeddings [B, embed_dim]."""
        return self.project_text(self.text(tokens, mask).pooled)

    def project_image(self, pooled: Tensor) -> Tensor:
        """Pooled image features [..., width] -> unit-length embeddings [..., embed_dim] in float32."""
        return F.normalize(self.image_projection(pooled).float(), dim=-1)

    def project_text(self, pooled: Tensor) -> Tensor:
        """Pooled text features [B, width] -> unit-length embeddings [B, embed_dim] in float32."""
        return F.normalize(self.text_projection(pooled).float(), dim=-1)

    @property
    def logit_scale(self) -> Tensor:
        """Inverse temperature, a scalar with gradient."""
        # Under FSDP2 the parameter is a vector of one element.
        return self.log_logit_scale.exp().reshape(())

    def saved_state(self) -> dict[str, Tensor]:
        """Weights by name as a model folder has them: contiguous, on the CPU, each with its own memory."""
        return saved_state(self)

    def first_dimensions(self, dim: int) -> "DualEncoder":
        """The same towers and temperature with the first `dim` dimensions of the projections.

        Raises:
            UserError: a tower of another library projects by itself.
        """
        projections = (_cut(self.image_projection, dim), _cut(self.text_projection, dim))
        limit = math.exp(self.max_log_logit_scale)
        cut = DualEncoder(self.vision, self.text, *projections, dim, 1.0, limit)
        cut.log_logit_scale = self.log_logit_scale
        return cut.train(self.training)

    @torch.no_grad()
    def clamp_temperature(self) -> None:
        """Keep the logit scale within [1, max_logit_scale]; called after each update (CLIP, section 2.5)."""
        self.log_logit_scale.clamp_(0, self.max_log_logit_scale)


class ImageEncoder(nn.Module):
    """A trainable copy of the vision tower and image projection of a dual encoder."""

    def __init__(self, encoder: DualEncoder, precision: Precision = "fp32") -> None:
        """`precision`: number format that the copy computes in."""
        super().__init__()
        self.precision = precision
        self.vision = copy.deepcopy(encoder.vision)
        self.projection = copy.deepcopy(encoder.image_projection)
        self.requires_grad_(True)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] -> unit-length embeddings [B, embed_dim] in float32."""
        with autocast(images.device.type, self.precision):
            features: Tensor = self.projection(self.vision(images).pooled)
        return F.normalize(features.float(), dim=-1)


def saved_state(module: nn.Module) -> dict[str, Tensor]:
    """The weights of a module by name, contiguous, on the CPU, each with its own memory."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    seen: set[int] = set()
    for name, tensor in state.items():
        if tensor.untyped_storage().data_ptr() in seen:  # tied weights, which safetensors refuses
            state[name] = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
    return state


def build_tower(config: VisionConfig | TextConfig, vocab_size: int = 0, pad_id: int = 0) -> VisionTower | TextTower:
    """One tower by itself. A text tower needs the size and the padding token of its vocabulary.

    Raises:
        UserError: it cannot be built from its configuration.
    """
    if isinstance(config, TextConfig):
        return build_text(config, vocab_size, pad_id)
    return build_vision(config, 1)[0]


def build_dual_encoder(config: ModelConfig, vocab_size: int, pad_id: int) -> DualEncoder:
    """The dual encoder of a configuration. Random weights come from torch's global generator.

    Raises:
        UserError: a tower cannot be built from its configuration.
    """
    vision, pretrained_projection = build_vision(config.vision, config.embed_dim)
    text = build_text(config.text, vocab_size, pad_id)
    if vision.projects:
        image_projection: nn.Module = nn.Identity()
    else:
        image_projection = _projection(vision.width, config.embed_dim, config.projection)
    if pretrained_projection is not None and isinstance(image_projection, nn.Linear):
        with torch.no_grad():
            image_projection.weight.copy_(pretrained_projection)
    if text.projects:
        text_projection: nn.Module = nn.Identity()
    else:
        text_projection = _projection(text.width, config.embed_dim, config.projection)
    projections = (image_projection, text_projection, config.embed_dim)
    return DualEncoder(vision, text, *projections, config.init_temperature, config.max_logit_scale)


def _cut(projection: nn.Module, dim: int) -> nn.Module:
    """A copy of a projection that computes the first `dim` of its dimensions.

    Raises:
        UserError: the projection belongs to a tower of another library.
    """
    cut = copy.deepcopy(projection)
    last = cut[-1] if isinstance(cut, nn.Sequential) and len(cut) else cut
    if not isinstance(last, nn.Linear):
        raise UserError(
            "--dim: a tower of this model projects by itself, so that its projection cannot be cut; use all dimensions"
        )
    last.weight = nn.Parameter(last.weight[:dim].detach().clone(), requires_grad=last.weight.requires_grad)
    if last.bias is not None:
        last.bias = nn.Parameter(last.bias[:dim].detach().clone(), requires_grad=last.bias.requires_grad)
    last.out_features = dim
    return cut


def _projection(width: int, embed_dim: int, kind: str) -> nn.Module:
    if kind == "mlp":
        return nn.Sequential(nn.Linear(width, embed_dim), nn.GELU(), nn.Linear(embed_dim, embed_dim, bias=False))
    linear = nn.Linear(width, embed_dim, bias=False)
    nn.init.normal_(linear.weight, std=width**-0.5)
    return linear
