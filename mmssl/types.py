"""Records that packages pass to each other."""

from __future__ import annotations  # so that `mmssl --help`, which needs UserError, does without torch

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor


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

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device) -> Batch:
        """A copy with every tensor but `augment_params` on `device` (asynchronously from pinned memory)."""
        return replace(
            self,
            views={name: view.to(device, non_blocking=True) for name, view in self.views.items()},
            **{f: getattr(self, f).to(device, non_blocking=True) for f in ("tokens", "token_mask", "ids")},
        )

    def slice(self, start: int, stop: int) -> Batch:
        """Samples [start, stop) as a batch of views on the same memory."""
        assert {f.name for f in fields(self)} == {"views", "tokens", "token_mask", "ids", "keys", "augment_params"}
        return Batch(
            views={name: view[start:stop] for name, view in self.views.items()},
            tokens=self.tokens[start:stop],
            token_mask=self.token_mask[start:stop],
            ids=self.ids[start:stop],
            keys=self.keys[start:stop],
            augment_params={name: rows[start:stop] for name, rows in self.augment_params.items()},
        )


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
