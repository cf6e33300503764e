"""Text towers: any Hugging Face encoder, pretrained or built from a configuration."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mmssl.config import TextConfig
from mmssl.errors import UserError, one_line
from mmssl.models.text_open_clip import MODEL_TYPE, OpenClipText, build_open_clip_text, is_plain
from mmssl.models.vision import Encoded


class TextTower(nn.Module):
    """A Hugging Face encoder with one pooled vector per caption.

    Attributes:
        width: size of the pooled vector and, unless the encoder projects, of token vectors.
        pooling: `cls`, `mean`, `eos` or `pooler`.
        projects: the encoder ends in its own projection to the shared space.
        source: the folder or hub name of its pretrained weights, if any.
    """

    encoder: Any

    def __init__(self, encoder: nn.Module, pooling: str, source: str | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.pooling = pooling
        self.source = source
        own = _own_dim(encoder) if pooling == "pooler" else None
        self.projects = own is not None
        self.width = int(self.encoder.config.hidden_size) if own is None else own
        self._locked = False

    def forward(self, tokens: Tensor, mask: Tensor) -> Encoded:
        """Encode captions: token ids int64 [B, L] and their mask bool [B, L] (True: a real token)."""
        output = self.encoder(input_ids=tokens, attention_mask=mask.long())
        hidden = output.last_hidden_state
        if self.pooling == "pooler":
            return Encoded(output.pooler_output, hidden)
        return Encoded(pool(hidden, mask, self.pooling), hidden)

    @property
    def embedding(self) -> Tensor:
        """The vectors of the vocabulary, [vocabulary, E]."""
        weight: Tensor = self.encoder.get_input_embeddings().weight
        return weight

    def to_config(self, tokenizer: str, max_tokens: int) -> TextConfig:
        """The configuration that builds a tower of this architecture, with random weights."""
        settings = {**self.encoder.config.to_diff_dict(), "model_type": self.encoder.config.model_type}
        for key in ("transformers_version", "architectures", "_name_or_path", "dtype"):
            settings.pop(key, None)
        if settings["model_type"] != MODEL_TYPE:
            settings["vocab_size"] = self.encoder.config.vocab_size
        pooling: Any = self.pooling
        return TextConfig(config=settings, tokenizer=tokenizer, pooling=pooling, max_tokens=max_tokens)

    def pretrained_mlm_head(self) -> "MaskedLanguageHead | None":
        """The masked-language head saved with the encoder's weights; None without one, or if its form is unknown."""
        if self.source is None:
            return None
        from transformers import AutoModelForMaskedLM

        try:
            with _quiet():
                model, report = AutoModelForMaskedLM.from_pretrained(self.source, output_loading_info=True)
        except ValueError:  # transformers has no masked-language head for this kind of encoder
            return None
        body = set(model.base_model.modules())
        modules = {n: m for n, m in model.named_modules() if m not in body}
        size = (model.config.hidden_size, model.config.hidden_size)
        dense = next((m for m in modules.values() if isinstance(m, nn.Linear) and m.weight.shape == size), None)
        norm = next((m for m in modules.values() if isinstance(m, nn.LayerNorm)), None)
        decoder = model.get_output_embeddings()
        tied = decoder is not None and decoder.weight is model.get_input_embeddings().weight
        absent = [key for key in report["missing_keys"] if not key.startswith(model.base_model_prefix)]
        if absent or dense is None or norm is None or not tied or decoder.bias is None:
            return None
        return MaskedLanguageHead(dense, norm, decoder.bias.detach())

    def checkpoint_activations(self) -> None:
        """Discard activations inside blocks in training and recompute them in the backward pass."""
        if hasattr(self.encoder, "activation_checkpointing_enable"):
            self.encoder.activation_checkpointing_enable()
        else:  # the older name of the same switch
            self.encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def lock(self, unlocked_layers: int = 0) -> None:
        """Freeze all but the last `unlocked_layers` transformer blocks.

        Raises:
            UserError: the encoder's blocks cannot be found.
        """
        self.requires_grad_(False)
        self._locked = True
        if unlocked_layers > 0:
            blocks = next((m for m in self.encoder.modules() if isinstance(m, nn.ModuleList) and len(m) > 0), None)
            if blocks is None:
                raise UserError("model.text.unlocked_layers: this tower has no list of blocks to unlock; set it to 0")
            for block in list(blocks)[-unlocked_layers:]:
                block.requires_grad_(True)
        self.train(self.training)

    def train(self, mode: bool = True) -> "TextTower":
        """As nn.Module.train, but a completely locked tower stays in evaluation mode (no dropout)."""
        return super().train(mode and not (self._locked and not any(p.requires_grad for p in self.parameters())))


def pool(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """One vector per caption [B, W] from token vectors [B, L, W]: the first one, the mean over real tokens,
    or the last real token."""
    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "mean":
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
    assert pooling == "eos", pooling
    last = mask.long().cumsum(1).argmax(1)
    return hidden.gather(1, last.view(-1, 1, 1).expand(-1, 1, hidden.shape[-1])).squeeze(1)


def build_text(config: TextConfig, vocab_size: int, pad_id: int) -> TextTower:
    """The text tower of a configuration. A tower with random weights takes the tokenizer's vocabulary size.

    Raises:
        UserError: the model cannot be found or built, or its vocabulary is smaller than the tokenizer's.
    """
    encoder = (
        _from_config(config.config, vocab_size, pad_id) if config.config is not None else _pretrained(str(config.name))
    )
    if encoder.config.vocab_size < vocab_size:
        raise UserError(
            f"model.text: the tokenizer has {vocab_size} tokens, the tower {encoder.config.vocab_size}; use "
            f"the tower's own tokenizer"
        )
    limit = getattr(encoder.config, "max_position_embeddings", None)
    if limit is not None and limit < config.max_tokens:
        raise UserError(
            f"model.text.max_tokens={config.max_tokens}, but the tower has {limit} positions; lower "
            f"model.text.max_tokens"
        )
    pooling = _pooling(config)
    # The weights of an unused pooler would get no gradient.
    if pooling != "pooler" and getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None
    tower = TextTower(encoder, pooling, config.name)
    if config.lock:
        tower.lock(config.unlocked_layers)
    return tower


@dataclass(frozen=True)
class MaskedLanguageHead:
    """The pretrained layers between a BERT-like encoder and its tied decoder."""

    dense: nn.Linear
    norm: nn.LayerNorm
    bias: Tensor
    """Bias of the decoder, [vocabulary]."""


def _from_config(options: dict[str, Any], vocab_size: int, pad_id: int) -> Any:
    values = {"vocab_size": vocab_size, "pad_token_id": pad_id, **options}
    kind = values.pop("model_type", None)
    if kind == MODEL_TYPE:
        return build_open_clip_text({key: value for key, value in values.items() if key != "pad_token_id"})
    if kind is None:
        raise UserError("model.text.config needs model_type, for example bert")
    from transformers import AutoConfig, AutoModel

    try:
        settings = AutoConfig.for_model(kind, **values)
        return AutoModel.from_config(settings)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"model.text.config: transformers could not build a {kind!r}: {one_line(error)}") from error


def _pretrained(name: str) -> Any:
    from transformers import AutoModel

    folder = Path(name)
    if folder.exists() and not (folder / "config.json").is_file():
        raise UserError(f"model.text.name={name}: the folder has no config.json; give a Hugging Face model folder")
    try:
        with _quiet():
            model = AutoModel.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.text.name={name!r} is neither a folder here nor reachable on the hub: {one_line(error, 200)}"
        ) from error
    return getattr(model, "text_model", model) if not hasattr(model.config, "hidden_size") else model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers, which warns about every unused weight of a folder."""
    import transformers

    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)


def _own_dim(encoder: Any) -> int | None:
    """Size of the vectors of an encoder that projects itself; None for any other."""
    projects = isinstance(encoder, OpenClipText) and encoder.projects
    return int(encoder.config.settings["output_dim"]) if projects else None


def _pooling(config: TextConfig) -> str:
    if config.config is not None and config.config.get("model_type") == MODEL_TYPE:
        return "eos" if is_plain({k: v for k, v in config.config.items() if k != "model_type"}) else "pooler"
    if config.pooling != "auto":
        return config.pooling
    declared = Path(config.name or "") / "1_Pooling" / "config.json"
    if config.name is not None and declared.is_file():
        flags = json.loads(declared.read_text(encoding="utf-8"))
        return "mean" if flags.get("pooling_mode_mean_tokens") else "cls"
    return "cls"
