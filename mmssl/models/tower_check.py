"""Tests of towers before any training: what a tower can do is tried with two inputs, not read from its class."""

import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmssl.config import TextConfig, VisionConfig
from mmssl.errors import UserError, one_line
from mmssl.models.dual_encoder import DualEncoder, saved_state
from mmssl.models.text import TextTower, probe_captions
from mmssl.models.text_factory import build_text
from mmssl.models.vision import Encoded, VisionTower, still
from mmssl.models.vision_factory import build_vision

Config = TypeVar("Config", TextConfig, VisionConfig)
Tower = TypeVar("Tower", TextTower, VisionTower)
SAMPLES = 32
"""Captions and images of the first batch that are compared at the start of a run."""
ONE_POINT = 5e-7
"""Unit vectors that differ by less in every coordinate are one point: float32 resolves 1e-7."""
_ALONE = 1e-4
"""Largest change of a vector, relative to the largest coordinate, by what else is in the batch."""
_SAVED = 1e-6
"""Largest change of a vector by saving and loading, relative to the largest coordinate: the same operations run."""
_CAUSES = {
    "cls": "the first token does not see the others; set model.text.pooling=eos or mean",
    "eos": "the last token does not see the others; set model.text.pooling=mean",
    "mean": "the encoder ignores its tokens; use another text tower",
    "pooler": "the encoder's own pooled vector looks for an end token that the captions do not have; set "
    "model.text.pooling=eos or mean, or use the tower's own tokenizer",
}


@dataclass(frozen=True)
class TowerReport:
    """What one tower can do."""

    name: str
    problem: str | None = None
    """Why it cannot be used; None if it can."""
    weights: int = 0
    width: int = 0
    tokens: str = "none"
    """Places of an image with a vector of their own, or `one per token`."""
    subsets: bool = False
    """It encodes a subset of the patches, as masked autoencoding needs."""
    checkpointing: bool = False
    """It can recompute activations (`train.activation_checkpointing`)."""
    unlocking: bool = False
    """Its last layers can be unlocked (`unlocked_layers`)."""
    seconds: float = 0.0
    remarks: list[str] = field(default_factory=list)


def check_towers(encoder: DualEncoder) -> list[str]:
    """Try both towers of a new model on its device with two inputs; returns a line for each that has idle weights.

    Torch's generators, weights and gradients stay as they are.

    Raises:
        UserError: a tower gives two different inputs the same vector.
    """
    lines = []
    for key, tower, encode in (
        ("model.vision", encoder.vision, lambda: encoder.vision(_two_images(encoder.vision))),
        ("model.text", encoder.text, lambda: encoder.text(*_two_captions(encoder.text))),
    ):
        _, idle = _encoded(tower, encode, key)
        lines += [f"{key}: {line}" for line in _idle_line(idle)]
    return lines


def check_embeddings(encoder: DualEncoder, images: Tensor | None, tokens: Tensor, mask: Tensor) -> None:
    """Compare the embeddings of the first different captions and images of a run.

    Args:
        images: uint8 [B, 3, S, S]; None in a run of captions alone.
        tokens: int64 [B, L], with their mask bool [B, L].

    Raises:
        UserError: all different captions, or all different images, have the same embedding.
    """
    captions = _different(tokens.masked_fill(~mask, -1))
    with still(encoder), torch.no_grad():
        # Not the compiled towers: other shapes than those of a step would be compiled again.
        texts = encoder.project_text(encoder.text.forward(tokens[captions], mask[captions]).pooled)
        seen = texts[:0]
        if images is not None:
            seen = encoder.project_image(encoder.vision.forward(images[_different(images.flatten(1))]).pooled)
    for key, rows, what, cause in (
        ("model.text", texts, "captions", _CAUSES[encoder.text.pooling]),
        ("model.vision", seen, "images", "the tower ignores its input; use another one, or other weights"),
    ):
        if len(rows) > 1 and _one_point(rows):
            raise UserError(f"{key}: the embeddings of {len(rows)} different {what} are one point: {cause}")


def examine_vision(name: str, config: VisionConfig, embed_dim: int | None = None) -> TowerReport:
    """Build a vision tower and try what it can do. `embed_dim`: default the tower's own, for those that project."""
    start = time.monotonic()
    try:
        tower = _built_vision(config, embed_dim)
        images = _two_images(tower)
        encoded, idle = _encoded(tower, lambda: tower(images), "model.vision")
        _check_alone(encoded.pooled.detach(), lambda row: tower(images[row : row + 1]).pooled, tower)
        saved = _reread(tower.to_config(config))
        _check_saved(tower, lambda: _built_vision(saved, embed_dim), lambda other: other(images).pooled)
    except UserError as error:
        return TowerReport(name, str(error))
    places = "none" if tower.places is None else f"{tower.places} x {tower.places}"
    return TowerReport(
        name,
        weights=_weights(tower),
        width=tower.width,
        tokens=places,
        subsets=tower.grid is not None,
        unlocking=_works(lambda: tower.lock(1)),
        checkpointing=_works(tower.checkpoint_activations),
        seconds=time.monotonic() - start,
        remarks=_idle_line(idle) + (["projects to the shared space itself"] if tower.projects else []),
    )


def examine_text(name: str, config: TextConfig) -> TowerReport:
    """Build a text tower and try what it can do, with random captions. No tokenizer is read or trained."""
    start = time.monotonic()
    try:
        # A tower that knows its vocabulary keeps it.
        known = config.config is None or "vocab_size" in config.config
        tower = build_text(config, 1 if known else config.vocab_size, pad_id=0)
        tokens, mask = _two_captions(tower)
        encoded, idle = _encoded(tower, lambda: tower(tokens, mask), "model.text")
        _check_alone(
            encoded.pooled.detach(), lambda row: tower(tokens[row : row + 1], mask[row : row + 1]).pooled, tower
        )
        _check_longest(tower, config.max_tokens)
        saved = _reread(tower.to_config("tokenizer", config.max_tokens))
        _check_saved(tower, lambda: build_text(saved, 1, pad_id=0), lambda other: other(tokens, mask).pooled)
    except UserError as error:
        return TowerReport(name, str(error))
    remarks = [f"pooling {tower.pooling}", *_idle_line(idle)]
    if tower.pad_to is not None:
        remarks.append(f"captions are padded to {tower.pad_to} tokens, because padding changes their vectors")
    return TowerReport(
        name,
        weights=_weights(tower),
        width=tower.width,
        tokens="one per token",
        unlocking=_works(lambda: tower.lock(1)),
        checkpointing=_works(tower.checkpoint_activations),
        seconds=time.monotonic() - start,
        remarks=remarks,
    )


def _built_vision(config: VisionConfig, embed_dim: int | None) -> VisionTower:
    try:
        return build_vision(config, embed_dim or 512)[0]
    except UserError as error:
        own = re.search(r"set model\.embed_dim=(\d+)", str(error))
        if own is None or embed_dim is not None:
            raise
        return build_vision(config, int(own[1]))[0]


def _encoded(tower: nn.Module, encode: Callable[[], Encoded], key: str) -> tuple[Encoded, list[str]]:
    """The encoding of two inputs, and the names of the unlocked weights that get no gradient from it."""
    trained = {name: parameter for name, parameter in tower.named_parameters() if parameter.requires_grad}
    with still(tower):
        encoded = encode()
        outputs = [encoded.pooled, *([] if encoded.tokens is None else [encoded.tokens])]
        total = torch.stack([output.float().square().mean() for output in outputs]).sum()
        found = _gradient(total, list(trained.values()), key) if trained else ()
    pooled = encoded.pooled.detach()
    if not bool(torch.isfinite(pooled).all()):
        raise UserError(f"{key}: the tower gives vectors that are not finite; use other weights or another tower")
    if _one_point(F.normalize(pooled.float(), dim=-1)):
        cause = _CAUSES[tower.pooling] if isinstance(tower, TextTower) else "use another tower, or other weights"
        raise UserError(f"{key}: two different inputs get the same vector: {cause}")
    return encoded, [name for name, gradient in zip(trained, found, strict=True) if gradient is None]


def _gradient(total: Tensor, weights: list[nn.Parameter], key: str) -> tuple[Tensor | None, ...]:
    try:
        return torch.autograd.grad(total, weights, allow_unused=True)
    except Exception as error:  # a tower may have a backward pass of its own, which raises any kind
        raise UserError(f"{key}: the tower has no gradient: {one_line(error, 200)}; use another tower") from error


def _check_alone(together: Tensor, alone: Callable[[int], Tensor], tower: nn.Module) -> None:
    """Raise UserError if the vector of an input depends on the other input of its batch."""
    with still(tower), torch.no_grad():
        rows = torch.cat([alone(row) for row in range(len(together))])
    worst = float((rows - together).abs().max() / together.abs().max())
    if worst > _ALONE:
        raise UserError(f"the vector of an input depends on the rest of its batch (by {worst:.0e}); use another tower")


def _reread(config: Config) -> Config:
    """A configuration as a model folder gives it back."""
    return type(config).model_validate_json(config.model_dump_json())


def _check_saved(tower: Tower, build: Callable[[], Tower], encode: Callable[[Tower], Tensor]) -> None:
    """Raise UserError if the tower, saved and loaded as model folders are, gives other vectors.

    Args:
        build: builds a tower from the saved configuration.
    """
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "model.safetensors"
        save_file(saved_state(tower), file)
        state = load_file(file)
    other = build()
    own = other.state_dict()
    differ = sorted(
        k for k in own.keys() | state.keys() if k not in own or k not in state or own[k].shape != state[k].shape
    )
    if differ:
        raise UserError(f"the tower cannot be loaded again: {len(differ)} weights differ, first {differ[0]}")
    other.load_state_dict(state)
    with still(tower), still(other), torch.no_grad():
        before, after = encode(tower), encode(other)
    worst = float((after - before).abs().max() / before.abs().max())
    if worst > _SAVED:
        raise UserError(
            f"the tower gives other vectors when it is saved and loaded (by {worst:.0e}); use another tower"
        )


def _check_longest(tower: TextTower, length: int) -> None:
    """Raise UserError if a caption of this length cannot be encoded."""
    tokens = torch.ones(1, length, dtype=torch.int64)
    try:
        with still(tower), torch.no_grad():
            tower(tokens, tokens.bool())
    except (IndexError, RuntimeError) as error:
        raise UserError(f"model.text.max_tokens={length}: the tower has fewer positions; lower it") from error


def _two_images(tower: VisionTower) -> Tensor:
    """Two different images of noise, one of them darker on one side, uint8 [2, 3, S, S]."""
    side = tower.image_size
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8, generator=generator)
    images[1, :, :, : side // 2] //= 4
    return images.to(tower.mean.device)


def _two_captions(tower: TextTower) -> tuple[Tensor, Tensor]:
    """Two captions of one length with the same first and last token, int64 [2, L], and their mask."""
    tokens, mask = probe_captions(tower.encoder, tower.pad_id)
    both = tokens[:1].repeat(2, 1)
    both[1, 1:-1] = tokens[0, 1:-1].flip(0)
    both[1, 2] = tokens[1, 0]  # an encoder without positions sees no order
    device = next(iter(tower.parameters())).device
    return both.to(device), mask[:1].repeat(2, 1).to(device)


def _one_point(rows: Tensor) -> bool:
    """True if unit vectors [N, D] are the same but for rounding."""
    return bool((rows - rows[:1]).abs().max() < ONE_POINT)


def _different(rows: Tensor) -> Tensor:
    """Indices of the first SAMPLES different rows of [B, N]."""
    _, groups = torch.unique(rows, dim=0, return_inverse=True)
    first = {int(group): index for index, group in reversed(list(enumerate(groups.tolist())))}
    return torch.tensor(sorted(first.values())[:SAMPLES], device=rows.device)


def _idle_line(idle: list[str]) -> list[str]:
    if not idle:
        return []
    return [f"{len(idle)} weights take no part and stay as they are, for example {idle[0]}"]


def _weights(tower: nn.Module) -> int:
    return sum(parameter.numel() for parameter in tower.parameters())


def _works(action: Callable[[], object]) -> bool:
    try:
        action()
    except UserError:
        return False
    return True
