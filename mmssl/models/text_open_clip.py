"""open_clip's own text transformers with the interface of a Hugging Face encoder."""

from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.errors import UserError, one_line

MODEL_TYPE = "open_clip"
"""`model.text.config.model_type` of these encoders."""
_OURS = ("quick_gelu", "custom_text", "output_dim")
"""Settings that open_clip's text_cfg does not have."""


@dataclass(frozen=True)
class OpenClipTextConfig:
    """The attributes of a Hugging Face configuration that towers use."""

    settings: dict[str, Any]
    """open_clip's text_cfg, with `quick_gelu`, `custom_text` and, if the encoder projects, `output_dim`."""
    hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    model_type: str = MODEL_TYPE

    def to_diff_dict(self) -> dict[str, Any]:
        """The settings to build it again."""
        return dict(self.settings)


class OpenClipText(nn.Module):
    """An open_clip TextTransformer.

    CLIP's transformer is causal and pooled at its last token. It returns token vectors, the tower pools and projects,
    and captions need no padding. Any other pads captions to the full length, as in its training, and pools and
    projects itself (`projects`).
    """

    def __init__(self, model: Any, settings: dict[str, Any]) -> None:
        """`model`: the TextTransformer; it is changed in place."""
        super().__init__()
        self.projects = not is_plain(settings)
        if self.projects:
            model.output_tokens = True
        else:
            model.text_projection = None
        self.model = model
        self.pad_id = int(settings.get("pad_id", 0))
        kept = {**settings, **({"output_dim": model.output_dim} if self.projects else {})}
        self.config = OpenClipTextConfig(kept, model.width, model.vocab_size, model.context_length)

    def pad_with(self, pad_id: int) -> None:
        """Set the padding token. An encoder that sees padding needs the one it was trained with."""
        self.pad_id = self.config.settings["pad_id"] = pad_id

    def lengthen(self, table: Tensor) -> None:
        """Set the position embeddings [P, W] of CLIP's transformer, and with them its longest caption."""
        assert not self.projects
        self.model.positional_embedding = nn.Parameter(table)
        self.model.num_pos = self.model.context_length = len(table)
        self.model.attn_mask = self.model.build_causal_mask()
        settings = {**self.config.settings, "context_length": len(table)}
        self.config = replace(self.config, settings=settings, max_position_embeddings=len(table))

    @property
    def text_cfg(self) -> Any:
        """open_clip's typed settings of this encoder."""
        return text_cfg(self.config.settings)

    def get_input_embeddings(self) -> nn.Module:
        """The vectors of the vocabulary."""
        embedding: nn.Module = self.model.token_embedding
        return embedding

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: object = None) -> None:
        """Recompute activations in the backward pass."""
        self.model.set_grad_checkpointing(True)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        """Token ids and mask [B, L] -> last_hidden_state [B, L', W] and pooler_output [B, D] (None for CLIP's)."""
        tokens = input_ids.masked_fill(attention_mask == 0, self.pad_id)
        if self.projects:
            length = self.model.context_length
            tokens = F.pad(tokens[:, :length], (0, max(0, length - tokens.shape[1])), value=self.pad_id)
            pooled, hidden = self.model(tokens)
            return SimpleNamespace(last_hidden_state=hidden, pooler_output=pooled)
        length = tokens.shape[1]
        x = self.model.token_embedding(tokens) + self.model.positional_embedding[:length]
        hidden = self.model.transformer(x, attn_mask=self.model.attn_mask[:length, :length].to(x.dtype))
        return SimpleNamespace(last_hidden_state=self.model.ln_final(hidden), pooler_output=None)


def is_plain(settings: dict[str, Any]) -> bool:
    """True if a text_cfg is CLIP's transformer: causal, pooled at the end token, projected without a bias."""
    cfg = text_cfg(settings)
    return (
        not (cfg.no_causal_mask or cfg.embed_cls or cfg.proj_bias)
        and cfg.pool_type in ("argmax", "eos")
        and cfg.proj_type == "linear"
    )


def text_cfg(settings: dict[str, Any]) -> Any:
    """open_clip's typed settings.

    Raises:
        UserError: a setting is unknown.
    """
    from open_clip.model import CLIPTextCfg

    try:
        return CLIPTextCfg(**{key: value for key, value in settings.items() if key not in _OURS})
    except TypeError as error:
        raise UserError(f"model.text.config: open_clip's text_cfg: {one_line(error)}") from error


def build_open_clip_text(settings: dict[str, Any]) -> OpenClipText:
    """The encoder of a text_cfg, with random weights.

    Raises:
        UserError: open_clip cannot build it.
    """
    from open_clip.model import _build_text_tower
    from open_clip.transformer import TextTransformer

    cfg = text_cfg(settings)
    if cfg.hf_model_name is not None:
        raise UserError("model.text.config: open_clip's text_cfg names a Hugging Face model; use model.text.name")
    try:
        model = _build_text_tower(settings.get("output_dim", cfg.width), asdict(cfg), settings.get("quick_gelu", False))
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise UserError(f"model.text.config: open_clip could not build it: {one_line(error)}") from error
    assert isinstance(model, TextTransformer)
    return OpenClipText(model, settings)


def text_module(model: Any, settings: dict[str, Any], embed_dim: int) -> tuple[OpenClipText, Tensor | None]:
    """The text transformer of an open_clip model and, for CLIP's transformer, its projection [embed_dim, width]."""
    from open_clip.model import _build_text_tower

    transformer = getattr(model, "text", None)
    if transformer is None:  # open_clip's CLIP has the parts of its transformer as direct attributes
        transformer = _build_text_tower(embed_dim, asdict(text_cfg(settings)), settings.get("quick_gelu", False))
        state = model.state_dict()
        transformer.load_state_dict({name: state[name] for name in transformer.state_dict()})
    projection = transformer.text_projection
    return OpenClipText(transformer, settings), projection.detach().T if is_plain(settings) else None
