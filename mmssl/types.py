"""Records that packages pass to each other."""

from __future__ import annotations  # so that `mmssl --help`, which needs UserError, does without torch

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CAPTION_FIELDS = (
    "caption",
    "text",
    "txt",
    "captions",
    "description",
    "title",
    "sentence",
    "sentences",
    "comment",
    "alt_text",
    "raw",
    "prompt",
)
"""Usual names of captions in tables and JSON, in order of preference."""


@dataclass(frozen=True)
class Sample:
    """One record of a shard, still encoded."""

    id: int
    """Position in the dataset (all shards in name order, each in file order): the key of its randomness."""
    shard: str
    """Path or URL of the tar it came from."""
    key: str
    """Its name inside the tar: everything before the first dot of the base name, with its folder."""
    image: bytes
    """The encoded image (JPEG, PNG, WebP, ...)."""
    fields: dict[str, Any]
    """The other members by extension: `txt` -> str, `cls` -> int, and each entry of `json` under its own name."""
    more_images: tuple[bytes, ...] = ()
    """Further encoded images of the same record."""
    mask: bytes = b""
    """The encoded mask of its classes, `KEY.mask.png` or `KEY.seg.png`; empty without one."""

    @property
    def caption(self) -> str:
        """Its `txt`; empty without one that is text."""
        text = self.fields.get("txt")
        return text if isinstance(text, str) else ""

    def each_image(self) -> Iterator[Sample]:
        """The record once for each of its images, with keys of their own."""
        for number, image in enumerate((self.image, *self.more_images)):
            yield replace(self, key=image_key(self.key, number), image=image, more_images=())


def image_key(key: str, number: int) -> str:
    """The key of one of the images of a sample: the sample's own for the first, `KEY#1` for the next."""
    return key if number == 0 else f"{key}#{number}"


@dataclass
class Batch:
    """One collated batch, or one rank's part of it. B is the number of samples on this rank."""

    views: dict[str, Tensor]
    """View name -> uint8 images [B, 3, H, W]."""
    tokens: Tensor
    """Token ids, int64 [B, L], padded to the longest caption of the global batch's part."""
    token_mask: Tensor
    """True where `tokens` is a real token, bool [B, L]."""
    ids: Tensor
    """Sample ids, int64 [B]."""
    keys: list[str]
    """`shard:key` of each sample, for messages."""
    augment_params: dict[str, Tensor] = field(default_factory=dict)
    """View name -> parameters of augmentations still to be applied on the device, float64 [B, n]."""
    groups: dict[str, Tensor] = field(default_factory=dict)
    """Field -> the number of each sample's value there, int64 [B]: equal for equal values, and for these alone."""
    more_tokens: dict[str, Tensor] = field(default_factory=dict)
    """Further captions of each sample: `tokens.1` and `token_mask.1`, [B, L] as `tokens` and `token_mask`, ..."""
    extras: dict[str, Tensor] = field(default_factory=dict)
    """Further inputs of objectives by name, B rows each."""

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device) -> Batch:
        """A copy with every tensor but `augment_params` on `device` (asynchronously from pinned memory)."""
        moved: dict[str, Any] = {
            f.name: _each(getattr(self, f.name), lambda tensor: tensor.to(device, non_blocking=True))
            for f in fields(self)
            if f.name not in ("keys", "augment_params")
        }
        return replace(self, **moved)

    def slice(self, start: int, stop: int) -> Batch:
        """Samples [start, stop) as a batch of views on the same memory."""
        rows: dict[str, Any] = {f.name: _each(getattr(self, f.name), lambda x: x[start:stop]) for f in fields(self)}
        return Batch(**rows)


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    """A value changed, or each value of a dictionary."""
    return {name: change(rows) for name, rows in value.items()} if isinstance(value, dict) else change(value)


@dataclass(frozen=True)
class Groups:
    """Numbers that say which images (left) and captions (right) belong together, beyond the two of one sample."""

    left: Tensor
    """Int64 [n, 1] or [n, 2]: an image and a caption with the same first number are positives of each other. With the
    same second number only, they are neither positive nor negative."""
    right: Tensor
    """The same of the captions, int64 [m, 1] or [m, 2]."""


class PipeCommand(str):
    """A shard that is the output of a shell command, written `pipe:COMMAND`.

    Only `expand` makes one, from a pattern for which the user allowed commands. Every other name, whatever it begins
    with, is a file or a URL: names of files, of indexes and of caches never run.
    """

    PREFIX = "pipe:"

    @property
    def command(self) -> str:
        """The text that the shell runs."""
        return self.removeprefix(self.PREFIX)
