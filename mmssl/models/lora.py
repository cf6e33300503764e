"""LoRA (Hu et al. 2022) with peft: a tower's weights are frozen, and low-rank changes of its layers are trained.

Adapters exist in training only: `merged` returns a model with the changes added to its weights.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmssl.config import LoraConfig, ModelConfig
from mmssl.errors import UserError
from mmssl.models.dual_encoder import DualEncoder
from mmssl.models.text import TextTower
from mmssl.models.vision import VisionTower, open_clip_class


class CalledAttention(nn.Module):
    """open_clip's self-attention as two linear layers that share the weights of its nn.MultiheadAttention.

    nn.MultiheadAttention reads the weights of its layers without calling them. peft's own adapter for it adds to and
    subtracts from the frozen weights in every forward pass, so that rounding makes them drift.
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads = attention.num_heads
        self.dropout = attention.dropout
        self.in_proj = _linear(attention.in_proj_weight, attention.in_proj_bias)
        self.out_proj = _linear(attention.out_proj.weight, attention.out_proj.bias)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Vectors [N, L, W], the same three times, and a mask to add, [L, L] or [N * heads, L, L] -> [N, L, W]."""
        assert query is key is value
        assert not need_weights
        n, length, _ = query.shape
        q, k, v = (x.view(n, length, self.heads, -1).transpose(1, 2) for x in self.in_proj(query).chunk(3, dim=-1))
        if attn_mask is not None and attn_mask.ndim == 3:
            attn_mask = attn_mask.view(n, self.heads, length, length)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout)
        attended: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return attended, None

    def restored(self) -> nn.MultiheadAttention:
        """An nn.MultiheadAttention with these weights."""
        width, bias = self.in_proj.in_features, self.in_proj.bias is not None
        attention = nn.MultiheadAttention(width, self.heads, self.dropout, bias, batch_first=True, device="meta")
        for kind in ("weight", "bias"):
            setattr(attention, f"in_proj_{kind}", getattr(self.in_proj, kind))
            setattr(attention.out_proj, kind, getattr(self.out_proj, kind))
        return attention.train(self.training)


def add_adapters(encoder: DualEncoder, config: ModelConfig) -> None:
    """Freeze each tower whose configuration has `lora` and add adapters to it, in place. New adapters change no output.

    The adapters' weights are drawn from torch's global generator.

    Raises:
        UserError: peft is not installed, or the tower lacks a requested layer.
    """
    if config.vision.lora is not None:
        side = encoder.vision.image_size
        image = torch.zeros(1, 3, side, side, dtype=torch.uint8)
        _adapt(encoder.vision, encoder.vision.trunk, (image,), config.vision.lora, "model.vision.lora")
    if config.text.lora is not None:
        tokens = torch.ones(1, 4, dtype=torch.int64)
        _adapt(encoder.text, encoder.text.encoder, (tokens, tokens.bool()), config.text.lora, "model.text.lora")


def merged(encoder: DualEncoder) -> DualEncoder:
    """A copy with the adapters added to the weights of the original layers; the encoder itself without adapters."""
    if not any("lora_A" in name for name, _ in encoder.named_parameters()):
        return encoder
    from peft.tuners.tuners_utils import BaseTunerLayer

    result = copy.deepcopy(encoder)
    for library in (result.vision.trunk, result.text.encoder):
        _replace(library, BaseTunerLayer, _absorbed)
        _replace(library, CalledAttention, CalledAttention.restored)
        if hasattr(library, "peft_config"):
            del library.peft_config
    return result


def without_adapters(config: ModelConfig) -> ModelConfig:
    """The configuration that builds the towers of `merged`."""
    vision, text = (tower.model_copy(update={"lora": None}) for tower in (config.vision, config.text))
    return config.model_copy(update={"vision": vision, "text": text})


def _adapt(
    tower: VisionTower | TextTower, library: nn.Module, probe: tuple[Tensor, ...], config: LoraConfig, key: str
) -> None:
    try:
        import peft
    except ImportError:
        raise UserError(f"{key} needs peft; install it: pip install 'mmssl[lora]'") from None
    tower.lock()
    _replace(library, open_clip_class("transformer", "ResidualAttentionBlock"), _with_called_attention)
    layers = _called_layers(tower, library, probe)
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=_targets(layers, config.targets, key),
    )
    peft.inject_adapter_in_model(settings, library)
    tower.train(tower.training)


def _called_layers(tower: nn.Module, library: nn.Module, probe: tuple[Tensor, ...]) -> dict[str, nn.Module]:
    """The layers that adapters can change, by name: linear layers and ungrouped convolutions called in a forward pass.

    Some weights are read without calling their layer (attention pooling of CLIP's ResNets): an adapter there would
    have no effect. The last projection of open_clip's text towers is left out, because they check that it is an
    nn.Linear.
    """
    kinds = {
        name: module
        for name, module in library.named_modules()
        if (isinstance(module, nn.Linear) or (type(module) is nn.Conv2d and module.groups == 1))
        and not name.endswith("text_projection")
    }
    called: set[nn.Module] = set()
    hooks = [module.register_forward_hook(lambda module, *_: called.add(module)) for module in kinds.values()]
    training = tower.training
    tower.eval()
    with torch.no_grad():
        tower(*probe)
    tower.train(training)
    for hook in hooks:
        hook.remove()
    return {name: module for name, module in kinds.items() if module in called}


def _targets(layers: dict[str, nn.Module], wanted: list[str] | None, key: str) -> list[str]:
    """Full names of the layers to adapt."""
    if wanted is None:
        linear = [name for name, module in layers.items() if isinstance(module, nn.Linear)]
        return linear or list(layers)
    chosen: list[str] = []
    for end in wanted:
        found = [name for name in layers if f".{name}".endswith(f".{end}")]
        if not found:
            known = sorted({name.rpartition(".")[2] for name in layers})
            raise UserError(
                f"{key}.targets: this tower has no adaptable layer with a name ending in {end!r}; "
                f"the endings are: {', '.join(known)}"
            )
        chosen += found
    return chosen


def _linear(weight: Tensor, bias: nn.Parameter | None) -> nn.Linear:
    """A layer that shares these parameters."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = weight
    if bias is not None:
        layer.bias = bias
    return layer


def _with_called_attention(block: nn.Module) -> nn.Module:
    attention = block.attn
    assert isinstance(attention, nn.MultiheadAttention)
    if attention.batch_first and not hasattr(block, "ln_1_kv"):  # otherwise it is cross-attention
        block.attn = CalledAttention(attention)
    return block


def _absorbed(adapted: nn.Module) -> nn.Module:
    """The ordinary layer of an adapted one, with the adapter merged."""
    adapted.merge()  # type: ignore[operator]
    layer: nn.Module = adapted.get_base_layer()  # type: ignore[operator]
    return layer


def _replace(module: nn.Module, kind: Any, make: Callable[..., nn.Module]) -> None:
    """Replace every descendant of a kind by `make(child)`."""
    for name, child in list(module.named_children()):
        if isinstance(child, kind):
            setattr(module, name, make(child))
        else:
            _replace(child, kind, make)
