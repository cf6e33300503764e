"""Text towers: a Hugging Face encoder, or one with its interface, with one pooled vector per caption."""

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.config import TextConfig
from mmssl.errors import UserError, one_line
from mmssl.models.positions import positions, stretch
from mmssl.models.text_open_clip import MODEL_TYPE, OpenClipText
from mmssl.models.vision import Encoded, still

PROBE_LENGTHS = (13, 6)
"""Tokens of the two captions that a new tower is measured with."""
LENGTH_GROUPS = 4
"""Groups of captions of like length into which a CPU's batch is split, so that short ones are hardly padded."""
SMALLEST_GROUP = 16
"""Captions in a group, below which a call costs more than the padding that it saves."""
WORTH_SPLITTING = 0.8
"""Fraction of a batch's tokens, padding included, that may be left for a split to pay."""


class TextTower(nn.Module):
    """A Hugging Face encoder with one pooled vector per caption. Its abilities are measured, not taken from its class.

    Attributes:
        width: size of the pooled vector.
        pooling: `cls`, `mean`, `eos` or `pooler`.
        projects: the encoder ends in its own projection to the shared space.
        source: the folder or hub name of its pretrained weights, if any.
        stretched_from: number of positions before they were stretched; None if they were not.
        pad_to: length to which every caption is padded, because its vector depends on its padding; None if it does not.
    """

    encoder: Any

    def __init__(
        self,
        encoder: Any,
        pooling: str,
        source: str | None = None,
        *,
        max_tokens: int = 77,
        pad_id: int = 0,
        reads_padding: bool = False,
    ) -> None:
        """Measure the encoder with two short captions.

        Args:
            max_tokens: length of the longest caption.
            pad_id: the padding token.
            reads_padding: the encoder was trained on captions padded to its full length, without a mask (SigLIP).

        Raises:
            UserError: the encoder cannot encode captions, or has no pooled vector for `pooling: pooler`.
        """
        super().__init__()
        self.encoder = encoder
        self.pooling = pooling
        self.source = source
        self.pad_id = pad_id
        self.reads_padding = reads_padding
        self.projects = pooling == "pooler" and isinstance(encoder, OpenClipText) and encoder.projects
        self.pad_to = int(encoder.config.max_position_embeddings) if reads_padding else None
        self.stretched_from: int | None = None
        self._locked = False
        self._options = call_options(encoder)
        self.width = self._measure(max_tokens)

    def _measure(self, max_tokens: int) -> int:
        """The width of the pooled vector. Sets `pad_to` if the second of two captions has another vector alone."""
        tokens, mask = probe_captions(self.encoder, self.pad_id)
        short = PROBE_LENGTHS[1]
        try:
            with still(self.encoder), torch.no_grad():
                try:
                    together, alone = self(tokens, mask).pooled, self(tokens[1:, :short], mask[1:, :short]).pooled
                except UserError:
                    raise
                except Exception:  # some encoders take captions of one length only
                    self.pad_to = max_tokens
                    return int(self(tokens, mask).pooled.shape[-1])
        except UserError:
            raise
        except Exception as error:  # encoders raise many kinds when they are not made for plain captions
            kind = self.encoder.config.model_type
            raise UserError(f"model.text: a {kind!r} cannot encode captions: {one_line(error, 200)}") from error
        if not torch.allclose(together[1], alone[0], rtol=0, atol=1e-5 * float(together.abs().max())):
            self.pad_to = self.pad_to or max_tokens
        return int(together.shape[-1])

    def forward(self, tokens: Tensor, mask: Tensor) -> Encoded:
        """Encode captions: token ids int64 [B, L] and their mask bool [B, L] (True: a real token).

        On a CPU, captions of like length are encoded together. Vectors of padding are then zero.
        """
        splits = self.pad_to is None and tokens.device.type == "cpu"
        groups = length_groups(mask) if splits else []
        if not groups:
            return Encoded(*self._encode(tokens, mask))
        parts = [self._encode(tokens[rows, :length], mask[rows, :length]) for rows, length in groups]
        length = max(tokens.shape[1], *(hidden.shape[1] for _, hidden in parts))
        back = torch.cat([rows for rows, _ in groups]).argsort()
        pooled = torch.cat([pooled for pooled, _ in parts])
        hidden = torch.cat([F.pad(hidden, (0, 0, 0, length - hidden.shape[1])) for _, hidden in parts])
        return Encoded(pooled[back], hidden[back])

    def _encode(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled vectors [B, W] and those of tokens [B, L, W] of captions that are padded to one length."""
        if self.pad_to is not None and tokens.shape[1] < self.pad_to:
            missing = self.pad_to - tokens.shape[1]
            tokens, mask = F.pad(tokens, (0, missing), value=self.pad_id), F.pad(mask, (0, missing))
        seen = torch.ones_like(mask) if self.reads_padding else mask
        output = call_encoder(self.encoder, tokens, seen, self._options)
        hidden = output.last_hidden_state
        if self.pooling == "pooler":
            pooled = getattr(output, "pooler_output", None)
            if pooled is None:
                kind = self.encoder.config.model_type
                raise UserError(f"model.text.pooling=pooler: a {kind!r} has no pooled vector; use mean or eos")
            return pooled, hidden
        return pool(hidden, mask, self.pooling), hidden

    @property
    def embedding(self) -> Tensor:
        """The vectors of the vocabulary, [vocabulary, E]."""
        weight: Tensor = self.encoder.get_input_embeddings().weight
        return weight

    @property
    def positions(self) -> int | None:
        """Length of the longest caption that the positions allow; None without a limit."""
        return positions(self.encoder)

    def stretch(self, length: int) -> None:
        """Interpolate learned positions, so that captions may have `length` tokens. Short captions keep their vectors.

        Raises:
            UserError: the encoder has no learned positions, or captions are padded to its full length.
        """
        had, kind = self.positions, self.encoder.config.model_type
        problem = f"model.text.max_tokens={length}, but the tower has {had} positions, which cannot be stretched"
        if self.pad_to is not None:
            raise UserError(f"{problem}, as it reads captions padded to its length; lower model.text.max_tokens")
        tokens, mask = probe_captions(self.encoder, self.pad_id)
        with still(self.encoder), torch.no_grad():
            before = self(tokens, mask).pooled
            if not stretch(self.encoder, length):
                raise UserError(f"{problem}: a {kind!r} has no table of them; lower model.text.max_tokens")
            longest = tokens[:1, :1].expand(1, length)
            try:
                fits = torch.allclose(self(tokens, mask).pooled, before, rtol=1e-5, atol=1e-6)
                self(longest, torch.ones_like(longest, dtype=torch.bool))
            except (IndexError, RuntimeError):  # a length is written down elsewhere in it
                fits = False
        if not fits:
            raise UserError(f"{problem}: a {kind!r} does not take them; lower model.text.max_tokens")
        self.stretched_from = had

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
            with quiet_transformers():
                model, report = AutoModelForMaskedLM.from_pretrained(
                    self.source, output_loading_info=True, dtype=torch.float32, trust_remote_code=False
                )
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
        """Discard activations inside blocks in training and recompute them in the backward pass.

        Raises:
            UserError: the library's encoder does not support this.
        """
        try:
            if hasattr(self.encoder, "activation_checkpointing_enable"):
                self.encoder.activation_checkpointing_enable()
            else:  # the older name of the same switch
                self.encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        except (ValueError, AttributeError, NotImplementedError) as error:
            kind = self.encoder.config.model_type
            raise UserError(
                f"train.activation_checkpointing: a {kind!r} text tower does not support it; set it to false"
            ) from error

    def lock(self, unlocked_layers: int = 0) -> None:
        """Freeze all but the last `unlocked_layers` transformer blocks and what follows them.

        With more layers than there are blocks, the embeddings are free too, which is everything.

        Raises:
            UserError: the encoder's blocks cannot be found.
        """
        self.requires_grad_(False)
        self._locked = True
        if unlocked_layers > 0:
            for parameter in _last_layers(self.encoder, unlocked_layers):
                parameter.requires_grad_(True)
        self.train(self.training)

    def train(self, mode: bool = True) -> "TextTower":
        """As nn.Module.train, but a completely locked tower stays in evaluation mode (no dropout)."""
        return super().train(mode and not (self._locked and not any(p.requires_grad for p in self.parameters())))


def length_groups(mask: Tensor) -> list[tuple[Tensor, int]]:
    """Rows of captions of like length, from the shortest on, and the length of the longest of each group.

    Empty if a split would not save a fifth of the tokens, or in a compiled graph, which would be made anew each time.
    """
    count = min(LENGTH_GROUPS, mask.shape[0] // SMALLEST_GROUP)
    if count < 2 or torch.compiler.is_compiling():
        return []
    places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    lengths = (mask * places).amax(1).clamp(min=1)
    groups = [(rows, int(lengths[rows].max())) for rows in lengths.argsort(stable=True).chunk(count)]
    left = sum(len(rows) * longest for rows, longest in groups)
    return groups if left <= WORTH_SPLITTING * mask.numel() else []


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


@dataclass(frozen=True)
class MaskedLanguageHead:
    """The pretrained layers between a BERT-like encoder and its tied decoder."""

    dense: nn.Linear
    norm: nn.LayerNorm
    bias: Tensor
    """Bias of the decoder, [vocabulary]."""


def call_options(encoder: nn.Module) -> dict[str, bool]:
    """How an encoder is called: `mask` if it takes a mask, `use_cache` if it would keep its keys and values."""
    named = inspect.signature(encoder.forward).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in named.values())
    return {"mask": "attention_mask" in named or open_ended, "use_cache": "use_cache" in named}


def call_encoder(encoder: Any, tokens: Tensor, mask: Tensor, options: dict[str, bool]) -> Any:
    """The output of an encoder for token ids and their mask, both [B, L]."""
    named: dict[str, Any] = {"attention_mask": mask.long()} if options["mask"] else {}
    if options["use_cache"]:
        named["use_cache"] = False
    return encoder(input_ids=tokens, **named)


def probe_captions(encoder: Any, pad_id: int) -> tuple[Tensor, Tensor]:
    """Two different captions of PROBE_LENGTHS tokens each, which end in the encoder's end token, and their mask."""
    size = int(getattr(encoder.config, "vocab_size", None) or 64)
    length = max(PROBE_LENGTHS)
    taken = {pad_id, *(getattr(encoder.config, name, None) for name in ("pad_token_id", "eos_token_id"))}
    usable = [index for index in range(size - 1, max(-1, size - 60), -1) if index not in taken] or [0]
    rows = [[usable[(5 * place + 3 * row) % len(usable)] for place in range(length)] for row in range(2)]
    end = getattr(encoder.config, "eos_token_id", None)
    tokens = torch.tensor(rows)
    mask = torch.arange(length) < torch.tensor(PROBE_LENGTHS).unsqueeze(1)
    if isinstance(end, int) and 0 <= end < size:
        tokens[torch.arange(2), mask.sum(1) - 1] = end
    return tokens.masked_fill(~mask, pad_id), mask


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers, which warns about every unused weight of a folder."""
    import transformers

    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)


def _last_layers(encoder: nn.Module, count: int) -> list[nn.Parameter]:
    """Weights of the last `count` blocks and of what follows them; all weights if there are fewer blocks."""
    lists = {name: m for name, m in encoder.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 0}
    outer = {n: m for n, m in lists.items() if not any(n.startswith(f"{other}.") for other in lists)}
    if not outer:
        raise UserError("model.text.unlocked_layers: this tower has no list of blocks to unlock; set it to 0")
    length = max(map(len, outer.values()))
    parent = next(name for name, m in outer.items() if len(m) == length).rpartition(".")[0]
    # Some encoders keep the parts of a block in lists side by side.
    blocks = [name for name, m in outer.items() if len(m) == length and name.rpartition(".")[0] == parent]
    if count > length:
        return list(encoder.parameters())
    names = [name for name, _ in encoder.named_parameters()]
    in_blocks = [name for name in names if name.startswith(tuple(f"{block}." for block in blocks))]
    freed = tuple(f"{block}.{index}." for block in blocks for index in range(length - count, length))
    after = names[names.index(in_blocks[-1]) + 1 :]
    free = {name for name in in_blocks if name.startswith(freed)}
    free |= {name for name in after if "embed" not in name}
    free |= {name for name in names if name.rpartition(".")[2] == "text_projection" or "text_projection." in name}
    return [parameter for name, parameter in encoder.named_parameters() if name in free]
