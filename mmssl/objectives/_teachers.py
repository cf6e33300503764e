"""Teachers of `distill`: a frozen model that encodes every batch, or embeddings that were stored before."""

import abc
import hashlib
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mmssl.data.transforms import Tokenizer, captions
from mmssl.errors import UserError
from mmssl.inference import Model, load, stored
from mmssl.objectives import _base as base
from mmssl.types import image_key

ROWS = 256
"""Samples per forward pass of a teacher, which keeps no activations."""
TABLES = 256
"""Shards whose keys stay in memory."""
IMAGE, TEXT = "distill.image", "distill.text"
"""Inputs: the teacher's unit vectors, float32 [B, D]."""
_VIEW, _TOKENS, _MASK = "distill", "distill.tokens", "distill.token_mask"


class Teacher(nn.Module, abc.ABC):
    """A source of embeddings of images and captions. Its state is not part of checkpoints."""

    dim: int
    """Dimensions of its embeddings."""
    logit_scale: float | None
    """Factor from its cosines to logits; None if it is unknown."""
    has_text: bool
    """It embeds captions too."""
    fingerprint: bytes
    """Sixteen bytes that change when its embeddings do."""

    @abc.abstractmethod
    def sample_inputs(self) -> base.SampleInputs:
        """The maker of its inputs."""

    def views(self) -> dict[str, base.Resized]:
        """The images it needs, by name of the view."""
        return {}

    @abc.abstractmethod
    def embed(self, inputs: base.Inputs) -> dict[str, Tensor]:
        """IMAGE and, with texts, TEXT, unless they are among the inputs."""


def open_teacher(source: str) -> Teacher:
    """The teacher at a path or name.

    Raises:
        UserError: there is neither a model nor stored embeddings.
    """
    folder = Path(source)
    return StoredTeacher(folder) if (folder / stored.RECORD).is_file() else ModelTeacher(load(source))


class ModelTeacher(Teacher):
    """A frozen model in evaluation mode, with its own image size, colours and tokenizer."""

    has_text = True

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.encoder = model.encoder.requires_grad_(False).eval()
        self.dim = model.config.embed_dim
        self.logit_scale = model.logit_scale
        self._tokens = TeacherTokens(model.tokenizer)
        self._interpolation = model.config.vision.interpolation
        made = repr((model.image_fingerprint(), model.text_fingerprint()))
        self.fingerprint = hashlib.blake2b(made.encode(), digest_size=16).digest()
        self.register_load_state_dict_pre_hook(_keep_own)  # type: ignore[no-untyped-call]

    def train(self, mode: bool = True) -> "ModelTeacher":
        """Stay in evaluation mode."""
        return super().train(False)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Nothing: the weights are in the teacher's own folder."""
        return {} if destination is None else destination

    def sample_inputs(self) -> base.SampleInputs:
        return self._tokens

    def views(self) -> dict[str, base.Resized]:
        return {_VIEW: base.Resized(self.encoder.vision.image_size, self._interpolation)}

    def embed(self, inputs: base.Inputs) -> dict[str, Tensor]:
        # The loader leaves the view out where it equals the main view.
        images, tokens, mask = inputs.get(f"view.{_VIEW}", inputs["view.main"]), inputs[_TOKENS], inputs[_MASK]
        parts = [slice(start, start + ROWS) for start in range(0, len(images), ROWS)]
        return {
            IMAGE: torch.cat([self.encoder.encode_image(images[part]) for part in parts]),
            TEXT: torch.cat([self.encoder.encode_text(tokens[part], mask[part]) for part in parts]),
        }


def _keep_own(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Fill what a state dict leaves out with a teacher's own weights."""
    assert isinstance(module, ModelTeacher)
    state.update(module.encoder.state_dict(prefix=f"{prefix}encoder."))


class TeacherTokens(base.SampleInputs):
    """Captions in the teacher's own tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __call__(self, captions: list[str], keys: list[str]) -> dict[str, Tensor]:
        tokens, mask = self._tokenizer.encode(captions)
        return {_TOKENS: tokens, _MASK: mask}

    def example(self, rows: int) -> dict[str, Tensor]:
        return self(["a photo of two dogs that run along a beach"] * rows, [])


class StoredTeacher(Teacher):
    """Embeddings that `mmssl embed` stored. No teacher runs in training."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._embeddings = StoredEmbeddings(folder)
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

    def _row(self, name: str, caption: str) -> tuple[npt.NDArray[np.float16], ...]:
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
                    f"and is trained with {_clean(caption)!r}; embedded captions are {{txt}}, so set data.captions to "
                    f"it and give each sample one, or give the teacher's model"
                )
            return tuple(array[row] for array in arrays)
        raise UserError(
            f"objectives.distill.teacher={self.folder} has no embedding of {name}; embed the training shards: mmssl "
            f"embed MODEL SHARDS --with-text --out {self.folder}"
        )

    def _read(self, part: int) -> tuple[dict[str, int], list[str], list[npt.NDArray[np.float16]]]:
        """Rows by key, captions, and the embeddings of images and captions of a part."""
        paths = [stored.vectors(self.folder, part)]
        if self.has_text:
            paths.append(stored.text_vectors(self.folder, part))
        if not paths[0].is_file():
            raise UserError(f"{self.folder} lacks the embeddings of a shard; resume with the same mmssl embed command")
        arrays = [stored.read_part(path, self.record.dim) for path in paths]
        table = stored.read_table(stored.table(self.folder, part), len(arrays[0]))
        keys, texts = table.column("key").to_pylist(), table.column("caption").to_pylist()
        return {key: row for row, key in enumerate(keys)}, list(map(_clean, texts)), arrays


def _clean(caption: str) -> str:
    return captions.clean_caption(caption)
