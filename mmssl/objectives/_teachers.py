"""Teachers of `distill`: a frozen model that encodes every batch, or embeddings that were stored before."""

import abc
import hashlib
from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmssl.config import TextConfig, VisionConfig
from mmssl.data.transforms import Tokenizer, captions, load_tokenizer
from mmssl.errors import UserError
from mmssl.inference import Model, load, stored
from mmssl.models import TextTower, VisionTower, build_tower
from mmssl.objectives import _base as base
from mmssl.types import image_key

ROWS = 256
"""Samples per forward pass of a teacher, which keeps no activations."""
LONGEST = 128
"""Tokens at which a text teacher cuts captions, if it has as many positions."""
_SHORT = 16
TABLES = 256
"""Shards whose keys stay in memory."""
IMAGE, TEXT = "distill.image", "distill.text"
"""Inputs: the teacher's unit vectors, float32 [B, D]."""
_VIEW, _TOKENS, _MASK = "distill", "distill.tokens", "distill.token_mask"


class Teacher(nn.Module, abc.ABC):
    """A source of embeddings of images and captions. Its state is not part of checkpoints."""

    dim: int
    """Dimensions of its embeddings."""
    logit_scale: float | None = None
    """Factor from its cosines to logits; None if it is unknown."""
    has_image: bool = True
    """It embeds images."""
    has_text: bool = True
    """It embeds captions."""
    fingerprint: bytes
    """Sixteen bytes that change when its embeddings do."""

    def sample_inputs(self) -> base.SampleInputs | None:
        """The maker of its inputs; None if views are enough."""
        return None

    def views(self) -> dict[str, base.Resized]:
        """The images it needs, by name of the view."""
        return {}

    @abc.abstractmethod
    def embed(self, inputs: base.Inputs) -> dict[str, Tensor]:
        """IMAGE, if it embeds images, and TEXT, if it embeds captions, unless they are among the inputs."""


def open_teacher(source: str, template: str | None = None) -> Teacher:
    """The teacher at a path or name: a model, stored embeddings, `timm:MODEL[/WEIGHTS]` or `text:NAME`.

    Args:
        template: of the captions that it reads. None: those of training.

    Raises:
        UserError: there is no such teacher.
    """
    library, _, name = source.partition(":")
    if library == "timm" and name:
        return VisionTeacher(name)
    if library == "text" and name:
        return TextTeacher(name, template)
    folder = Path(source)
    if (folder / stored.RECORD).is_file():
        return StoredTeacher(folder, template)
    return ModelTeacher(load(source), template)


class FrozenTeacher(Teacher):
    """A frozen module in evaluation mode, which is not part of checkpoints."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder: Any = encoder.requires_grad_(False).eval()
        self.register_load_state_dict_pre_hook(_keep_own)  # type: ignore[no-untyped-call]

    def train(self, mode: bool = True) -> "FrozenTeacher":
        """Stay in evaluation mode."""
        return super().train(False)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Nothing: the weights are in the teacher's own folder."""
        return {} if destination is None else destination


class ModelTeacher(FrozenTeacher):
    """A dual encoder, with its own image size, colours and tokenizer."""

    def __init__(self, model: Model, template: str | None) -> None:
        super().__init__(model.encoder)
        self.dim = model.config.embed_dim
        self.logit_scale = model.logit_scale
        self._tokens = TeacherTokens(model.tokenizer, template)
        self._interpolation = model.config.vision.interpolation
        made = repr((model.image_fingerprint(), model.text_fingerprint()))
        self.fingerprint = hashlib.blake2b(made.encode(), digest_size=16).digest()

    def sample_inputs(self) -> base.SampleInputs:
        return self._tokens

    def views(self) -> dict[str, base.Resized]:
        return {_VIEW: base.Resized(self.encoder.vision.image_size, self._interpolation)}

    def embed(self, inputs: base.Inputs) -> dict[str, Tensor]:
        return {
            IMAGE: _in_parts(self.encoder.encode_image, _images(inputs)),
            TEXT: _in_parts(self.encoder.encode_text, inputs[_TOKENS], inputs[_MASK]),
        }


class VisionTeacher(FrozenTeacher):
    """A model of timm, which embeds images alone: its pooled vector before the classifier."""

    has_text = False

    def __init__(self, name: str) -> None:
        """`name`: MODEL, or MODEL/WEIGHTS with a tag of timm or a file."""
        model, _, weights = name.partition("/")
        tower = build_tower(VisionConfig(name=f"timm:{model}", pretrained=weights or "true"))
        assert isinstance(tower, VisionTower)
        super().__init__(tower)
        self.dim = tower.width
        self.fingerprint = _digest(tower, (tower.image_size, tower.statistics))

    def views(self) -> dict[str, base.Resized]:
        return {_VIEW: base.Resized(self.encoder.image_size)}

    def embed(self, inputs: base.Inputs) -> dict[str, Tensor]:
        return {IMAGE: _in_parts(self._encode, _images(inputs))}

    def _encode(self, images: Tensor) -> Tensor:
        return _unit(self.encoder(images).pooled)


class TextTeacher(FrozenTeacher):
    """An encoder of transformers, which embeds captions alone, pooled as its folder declares."""

    has_image = False

    def __init__(self, name: str, template: str | None) -> None:
        """`name`: a hub name or a folder with weights and a tokenizer."""
        tokenizer = load_tokenizer(name, LONGEST)
        words = tokenizer.vocab_size, tokenizer.pad_id
        tower = build_tower(TextConfig(name=name, max_tokens=_SHORT), *words)
        assert isinstance(tower, TextTower)
        longest = min(LONGEST, tower.positions or LONGEST)
        if tower.pad_to == _SHORT:  # it pads captions, to the longest one
            tower = build_tower(TextConfig(name=name, max_tokens=longest), *words)
        super().__init__(tower)
        self.dim = int(tower.width)
        self._tokens = TeacherTokens(load_tokenizer(name, longest), template)
        self.fingerprint = _digest(tower, (sorted(tokenizer.vocabulary.items()), longest))

    def sample_inputs(self) -> base.SampleInputs:
        return self._tokens

    def embed(self, inputs: base.Inputs) -> dict[str, Tensor]:
        return {TEXT: _in_parts(self._encode, inputs[_TOKENS], inputs[_MASK])}

    def _encode(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return _unit(self.encoder(tokens, mask).pooled)


def _images(inputs: base.Inputs) -> Tensor:
    """The teacher's images; the loader leaves the view out where it equals the main view."""
    name = f"view.{_VIEW}"
    return inputs[name if name in inputs else "view.main"]


def _in_parts(encode: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """The vectors of all rows of the inputs, ROWS samples at a time."""
    starts = range(0, len(inputs[0]), ROWS)
    return torch.cat([encode(*(rows[start : start + ROWS] for rows in inputs)) for start in starts])


def _unit(pooled: Tensor) -> Tensor:
    return nn.functional.normalize(pooled.float(), dim=1)


def _digest(module: nn.Module, facts: object) -> bytes:
    """Sixteen bytes of a module's weights and of what else its vectors depend on."""
    digest = hashlib.blake2b(repr(facts).encode(), digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.digest()


def _keep_own(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Fill what a state dict leaves out with a teacher's own weights."""
    assert isinstance(module, FrozenTeacher)
    state.update(module.encoder.state_dict(prefix=f"{prefix}encoder."))


class TeacherTokens(base.SampleInputs):
    """Captions in the teacher's own tokens."""

    def __init__(self, tokenizer: Tokenizer, template: str | None) -> None:
        self._tokenizer, self.template = tokenizer, template

    def __call__(self, captions: list[str], keys: list[str]) -> dict[str, Tensor]:
        tokens, mask = self._tokenizer.encode(captions)
        return {_TOKENS: tokens, _MASK: mask}

    def example(self, rows: int) -> dict[str, Tensor]:
        return self(["a photo of two dogs that run along a beach"] * rows, [])


class StoredTeacher(Teacher):
    """Embeddings that `mmssl embed` stored. No teacher runs in training."""

    def __init__(self, folder: Path, template: str | None) -> None:
        super().__init__()
        self._embeddings = StoredEmbeddings(folder)
        self._embeddings.template = template
        record = self._embeddings.record
        self.dim = record.dim
        self.logit_scale = record.logit_scale
        self.has_text = self._embeddings.has_text
        made = repr((record.model, record.text_model))
        self.fingerprint = hashlib.blake2b(made.encode(), digest_size=16).digest()

    def sample_inputs(self) -> base.SampleInputs:
        return self._embeddings

    def embed(self, inputs: base.Inputs) -> dict[str, Tensor]:
        return {}


class StoredEmbeddings(base.SampleInputs):
    """Rows of a folder of embeddings, looked up by shard and key."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        record = stored.read_record(folder)
        assert record is not None
        self.record = record
        self.has_text = record.text_model is not None
        self._number = cache(stored.PartFinder(record).__call__)
        self._part = lru_cache(TABLES)(self._read)

    def __call__(self, captions: list[str], keys: list[str]) -> dict[str, Tensor]:
        found = [self._row(key, caption) for key, caption in zip(keys, captions, strict=True)]
        return {
            name: nn.functional.normalize(torch.from_numpy(np.stack(rows).astype(np.float32)), dim=1)
            for name, rows in zip(self._inputs(), zip(*found, strict=True), strict=True)
        }

    def example(self, rows: int) -> dict[str, Tensor]:
        ones = torch.ones(rows, self.record.dim)
        return {name: nn.functional.normalize(ones, dim=1) for name in self._inputs()}

    def _inputs(self) -> tuple[str, ...]:
        return (IMAGE, TEXT) if self.has_text else (IMAGE,)

    def _row(self, name: str, caption: str) -> tuple[stored.Rows, ...]:
        """The embeddings of a sample `shard:key`."""
        for end in (place for place, letter in enumerate(name) if letter == ":"):
            part = self._number(name[:end])
            if part is None:
                continue
            rows, texts, arrays = self._part(part)
            key = name[end + 1 :]
            row = rows.get(key)
            if row is None:
                continue
            if image_key(key, 1) in rows:
                raise UserError(
                    f"objectives.distill.teacher={self.folder}: {name} has several images, of which training draws "
                    f"one; give the teacher's model in place of stored embeddings"
                )
            if self.has_text and texts[row] != _clean(caption):
                raise UserError(
                    f"objectives.distill.teacher={self.folder}: {name} was embedded with the caption {texts[row]!r} "
                    f"and is trained with {_clean(caption)!r}; embedded captions are {{txt}}, so set data.captions, or "
                    f"objectives.distill.captions, to it and give each sample one, or give the teacher's model"
                )
            return tuple(array[row] for array in arrays)
        raise UserError(
            f"objectives.distill.teacher={self.folder} has no embedding of {name}; embed the training shards: mmssl "
            f"embed MODEL SHARDS --with-text --out {self.folder}"
        )

    def _read(self, part: int) -> tuple[dict[str, int], list[str], list[stored.Rows]]:
        """Rows by key, captions, and the embeddings of images and captions of a part."""
        paths = [stored.vectors(self.folder, part)]
        if self.has_text:
            paths.append(stored.text_vectors(self.folder, part))
        if not paths[0].is_file():
            raise UserError(f"{self.folder} lacks the embeddings of a shard; resume with the same mmssl embed command")
        arrays = [stored.read_part(path, self.record) for path in paths]
        table = stored.read_table(stored.table(self.folder, part), len(arrays[0]))
        keys, texts = table.column("key").to_pylist(), table.column("caption").to_pylist()
        return {key: row for row, key in enumerate(keys)}, list(map(_clean, texts)), arrays


def _clean(caption: str) -> str:
    return captions.clean_caption(caption)
