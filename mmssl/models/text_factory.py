"""Text towers from a configuration: pretrained by name, or of any model type of transformers with random weights."""

import importlib
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmssl.config import TextConfig
from mmssl.errors import UserError, one_line
from mmssl.models.positions import positions
from mmssl.models.text import TextTower, call_encoder, call_options, probe_captions, quiet_transformers
from mmssl.models.text_open_clip import MODEL_TYPE, OpenClipText, build_open_clip_text
from mmssl.models.vision import still

_READ_PADDING = ("siglip_text_model", "siglip2_text_model")
"""Kinds whose own pooled vector is that of captions padded to the full length and read without a mask."""
_TEXT_PARTS = ("text_model", "language_model")
"""Names of the text part of an image-text model."""
_ROUNDING = 16
_POSITIONS = ("max_position_embeddings", "num_hash_buckets")
"""Numbers of positions that are rounded up to a multiple of _ROUNDING if an encoder does not take its longest caption:
CANINE pads captions inside, and its table of positions has a row for each hash."""
_SENTENCE_POOLING = {"cls": "cls", "mean": "mean", "lasttoken": "eos"}
"""sentence-transformers' name of a pooling -> ours."""
_SENTENCE_MODULES = ("Transformer", "Pooling", "Normalize", "Dropout")
"""sentence-transformers' modules that a tower stands for. Normalize changes lengths only, and embeddings have length 1;
Dropout is off when it encodes."""
_FLAG = "pooling_mode_"
_OLDER_FLAGS = {f"{_FLAG}cls_token": "cls", f"{_FLAG}mean_tokens": "mean", f"{_FLAG}lasttoken": "lasttoken"}
"""The same in its older form, one flag for each."""


def build_text(config: TextConfig, vocab_size: int, pad_id: int) -> TextTower:
    """The text tower of a configuration. A tower with random weights takes the tokenizer's vocabulary size.

    Raises:
        UserError: the model cannot be found or built, or its vocabulary is smaller than the tokenizer's.
    """
    if config.config is not None:
        encoder = _from_config(config.config, vocab_size, pad_id, config.max_tokens)
    else:
        encoder = _pretrained(str(config.name))
    size = getattr(encoder.config, "vocab_size", None)
    if size is not None and size < vocab_size:
        raise UserError(
            f"model.text: the tokenizer has {vocab_size} tokens, the tower {size}; use the tower's own tokenizer"
        )
    usable = positions(encoder)
    too_short = usable is not None and usable < config.max_tokens
    if too_short and config.config is not None:
        raise UserError(
            f"model.text.max_tokens={config.max_tokens}, but the tower has {usable} positions; lower "
            f"model.text.max_tokens"
        )
    pooling = _pooling(config, encoder, pad_id)
    reads_padding = pooling == "pooler" and encoder.config.model_type in _READ_PADDING
    measured = config.model_copy(update={"max_tokens": usable}) if too_short else config
    tower = _with_used_pooler(encoder, pooling, measured, pad_id, reads_padding)
    if too_short:
        tower.stretch(config.max_tokens)
    if config.lock:
        tower.lock(config.unlocked_layers)
    return tower


def _with_used_pooler(encoder: Any, pooling: str, config: TextConfig, pad_id: int, reads_padding: bool) -> TextTower:
    """The tower, without the encoder's own pooling layer unless that is used: its weights would get no gradient."""
    pooler = getattr(encoder, "pooler", None)

    def tower() -> TextTower:
        return TextTower(
            encoder, pooling, config.name, max_tokens=config.max_tokens, pad_id=pad_id, reads_padding=reads_padding
        )

    if pooling == "pooler" or not isinstance(pooler, nn.Module):
        return tower()
    encoder.pooler = None
    try:
        return tower()
    except UserError:  # this encoder calls it in any case
        encoder.pooler = pooler.requires_grad_(False)
        return tower()


def _from_config(options: dict[str, Any], vocab_size: int, pad_id: int, max_tokens: int) -> Any:
    values = {"vocab_size": vocab_size, "pad_token_id": pad_id, **options}
    kind = values.pop("model_type", None)
    if kind == MODEL_TYPE:
        return build_open_clip_text({key: value for key, value in values.items() if key != "pad_token_id"})
    if kind is None:
        raise UserError("model.text.config needs model_type, for example bert")
    encoder = _random(kind, values)
    usable = positions(encoder)
    if usable is None:
        return encoder
    declared = int(encoder.config.max_position_embeddings)
    if usable < max_tokens <= declared:
        # RoBERTa's family counts positions from the padding token's on, so some of them are never used.
        encoder = _random(kind, {**values, "max_position_embeddings": max_tokens + declared - usable})
    elif 0 <= usable - max_tokens < _ROUNDING and not _fits(encoder, max_tokens):
        rounded = -(-declared // _ROUNDING) * _ROUNDING
        encoder = _random(kind, {**values, **{key: rounded for key in _POSITIONS if hasattr(encoder.config, key)}})
        if not _fits(encoder, max_tokens):
            raise UserError(f"model.text.max_tokens={max_tokens}: a {kind!r} cannot encode captions of that length")
    return encoder


def _fits(encoder: Any, length: int) -> bool:
    """True if the encoder takes a caption of this length."""
    tokens = torch.ones(1, length, dtype=torch.int64)
    try:
        with still(encoder), torch.no_grad():
            call_encoder(encoder, tokens, tokens.bool(), call_options(encoder))
    except (IndexError, RuntimeError):
        return False
    except Exception:  # another kind of error is no matter of length; the measurement of the tower will tell
        return True
    return True


def _random(kind: str, values: dict[str, Any]) -> Any:
    """The text encoder of a model type, with random weights in float32."""
    from transformers import AutoConfig, AutoModel

    try:
        settings = AutoConfig.for_model(kind, **values)
        if type(settings) in AutoModel._model_mapping:
            classes = AutoModel._model_mapping[type(settings)]
            if isinstance(classes, tuple) and not settings.architectures:  # Funnel's, whose first one keeps all tokens
                settings.architectures = [classes[0].__name__]
            model = AutoModel.from_config(settings, trust_remote_code=False)
        else:
            model = _text_class(settings)(settings)
    except Exception as error:  # libraries raise many kinds on options that do not fit together
        raise UserError(f"model.text.config: transformers could not build a {kind!r}: {one_line(error)}") from error
    return _text_part(model, kind).float()


def _text_class(settings: Any) -> Any:
    """The class of the text half of an image-text model, which has no automatic class."""
    package = importlib.import_module(type(settings).__module__.rpartition(".")[0])
    names = [name for name in dir(package) if name.endswith("TextModel")]
    found = [
        c for c in (getattr(package, name) for name in names) if getattr(c, "config_class", None) is type(settings)
    ]
    if not found:
        raise ValueError("transformers has no text model for it")
    return found[0]


def _pretrained(name: str) -> Any:
    from transformers import AutoConfig, AutoModel

    folder = Path(name)
    if folder.exists() and not (folder / "config.json").is_file():
        raise UserError(f"model.text.name={name}: the folder has no config.json; give a Hugging Face model folder")
    from mmssl.models.pretrained import foreign  # imports this module

    try:
        with quiet_transformers(), foreign.reading(folder) if folder.is_dir() else nullcontext():
            settings = AutoConfig.from_pretrained(name, trust_remote_code=False)
            kind = AutoModel if type(settings) in AutoModel._model_mapping else _text_class(settings)
            # The stored type may be a half format, which neither trains well nor multiplies with the projections.
            model = kind.from_pretrained(name, dtype=torch.float32, trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:  # transformers raises many kinds on what it cannot read
        raise UserError(
            f"model.text.name={name!r} is neither a folder here nor reachable on the hub: {one_line(error, 200)}"
        ) from error
    return _text_part(model, name)


def _text_part(model: Any, name: str) -> Any:
    """The part of a model that encodes text: an encoder-decoder's encoder, or an image-text model's text half."""
    if getattr(model.config, "is_encoder_decoder", False):
        encoder = model.get_encoder()
        if encoder is model:
            raise UserError(f"model.text: {name} has no encoder of its own; use an encoder such as bert")
        if type(encoder.config) is not type(model.config):
            raise UserError(f"model.text: {name} has an encoder that cannot be saved by itself; use another encoder")
        # The kind from which it can be built again.
        encoder.config.is_encoder_decoder = True
        return encoder
    parts = [getattr(model, part) for part in _TEXT_PARTS if isinstance(getattr(model, part, None), nn.Module)]
    is_pair = any(hasattr(model.config, key) for key in ("vision_config", "image_config"))
    return parts[0] if is_pair and parts else model


def _pooling(config: TextConfig, encoder: Any, pad_id: int) -> str:
    """The pooling of the configuration; for `auto`, what the model declares or was made for."""
    if isinstance(encoder, OpenClipText):
        return "pooler" if encoder.projects else "eos"
    if config.pooling != "auto":
        return config.pooling
    declared = None if config.name is None else _declared_pooling(config.name)
    if declared is not None:
        return declared
    if encoder.config.model_type in _READ_PADDING:
        return "pooler"
    if getattr(encoder.config, "is_encoder_decoder", False):
        return "mean"
    return "eos" if _is_causal(encoder, pad_id) else "cls"


def _is_causal(encoder: Any, pad_id: int) -> bool:
    """True if the vector of the first token does not see the last one."""
    tokens, mask = probe_captions(encoder, pad_id)
    changed = tokens[:1].clone()
    changed[0, -2] = tokens[1, 0]
    try:
        with still(encoder), torch.no_grad():
            first, second = (
                call_encoder(encoder, t, mask[:1], call_options(encoder)).last_hidden_state
                for t in (tokens[:1], changed)
            )
    except Exception as error:  # encoders raise many kinds when they are not made for plain captions
        kind = encoder.config.model_type
        raise UserError(f"model.text: a {kind!r} cannot encode captions: {one_line(error, 200)}") from error
    return torch.equal(first[:, 0], second[:, 0]) and not torch.equal(first[:, -1], second[:, -1])


def _declared_pooling(name: str) -> str | None:
    """The pooling that a folder or hub model of sentence-transformers declares; None for any other model.

    Raises:
        UserError: it is one that towers do not have, or the model has layers beside its encoder and pooling.
    """
    modules = _sentence_modules(name)
    place = next((place for kind, place in modules if kind == "Pooling"), "1_Pooling")
    record = _read_json(name, f"{place}/config.json")
    if record is None:
        return None
    mode = record.get("pooling_mode")
    modes = [mode] if isinstance(mode, str) else list(mode or [])
    modes = modes or [_OLDER_FLAGS.get(key, key) for key, value in record.items() if key.startswith(_FLAG) and value]
    if len(modes) != 1 or modes[0] not in _SENTENCE_POOLING:
        raise UserError(
            f"model.text.name={name} declares the pooling {'+'.join(modes) or 'none'}, which text towers do not have; "
            f"set model.text.pooling to mean, cls or eos"
        )
    others = [kind for kind, _ in modules if kind not in _SENTENCE_MODULES]
    if others:
        raise UserError(
            f"model.text.name={name} has layers beside its encoder and pooling ({', '.join(others)}), which text "
            f"towers do not have; to use it without them, set model.text.pooling={_SENTENCE_POOLING[modes[0]]}"
        )
    return _SENTENCE_POOLING[modes[0]]


def _sentence_modules(name: str) -> list[tuple[str, str]]:
    """Kind and folder of the modules that a model of sentence-transformers lists, in order; none for other models."""
    modules = _read_json(name, "modules.json")
    if modules is None:
        return []
    try:
        return [(str(entry["type"]).rpartition(".")[2], str(entry["path"])) for entry in modules]
    except (TypeError, KeyError):
        raise UserError(f"{name}/modules.json is no list of modules; copy the model again") from None


def _read_json(name: str, path: str) -> Any:
    """A JSON file of a model folder or of the hub; None if there is none."""
    from transformers.utils import cached_file

    try:
        found = cached_file(
            name,
            path,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return None if found is None else json.loads(Path(found).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{name}/{path} cannot be read: {one_line(error)}") from error
