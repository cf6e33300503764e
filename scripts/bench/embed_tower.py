"""Speed of `mmssl embed` as a fraction of the vision tower's own speed."""

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import torch
from torch import Tensor

from mmssl.apps.search import embed_shards
from mmssl.data import iter_samples
from mmssl.errors import UserError
from mmssl.inference import Model

READY_BATCHES = 8
"""Batches of images that are kept rendered; the tower sees them again and again."""


@dataclass(frozen=True)
class TowerBench:
    """Seconds of each round, in turn."""

    images: int
    batch_size: int
    threads: int
    embed: list[float]
    """`mmssl embed`: reading, decoding, encoding and writing all images."""
    tower: list[float]
    """The forward pass alone, of as many images in as large batches, rendered before."""

    @property
    def ratios(self) -> list[float]:
        """Fraction of the tower's speed that embedding reaches, one per round."""
        return [tower / embed for embed, tower in zip(self.embed, self.tower, strict=True)]

    def text(self) -> str:
        """A table for a terminal."""
        lines = [f"{'':12} {'images/s':>10} {'seconds':>8}"]
        for name, seconds in (("mmssl embed", self.embed), ("tower alone", self.tower)):
            middle = statistics.median(seconds)
            lines.append(f"{name:12} {self.images / middle:10.1f} {middle:8.2f}")
        low, high = min(self.ratios), max(self.ratios)
        lines.append(
            f"ratio {statistics.median(self.ratios):.3f} [{low:.3f}, {high:.3f}] over {len(self.embed)} rounds; "
            f"{self.images:,} images in batches of {self.batch_size}, {self.threads} CPU threads"
        )
        return "\n".join(lines)


def bench_tower(model: Model, shards: Sequence[str], *, batch_size: int, rounds: int) -> TowerBench:
    """Embed all images of shards, and encode as many rendered ones, in turn. Before, without a clock, embedding
    runs once and the tower on one batch.

    Raises:
        UserError: the shards hold no image.
    """
    ready = _render(model, shards, batch_size)
    images = _embed(model, shards, batch_size)
    _encode(model, ready, batch_size)
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        start = time.perf_counter()
        _embed(model, shards, batch_size)
        between = time.perf_counter()
        _encode(model, ready, images)
        seconds[0].append(between - start)
        seconds[1].append(time.perf_counter() - between)
    return TowerBench(images, batch_size, torch.get_num_threads(), *seconds)


def _render(model: Model, shards: Sequence[str], batch_size: int) -> list[Tensor]:
    """The first images as the model sees them, in batches."""
    samples = islice(iter_samples(shards, need_text=False, on_bad=lambda bad: None), READY_BATCHES * batch_size)
    images = [model.render(sample.image) for sample in samples]
    if not images:
        raise UserError("there is no image to embed; the shards are empty")
    return list(torch.split(torch.stack(images), batch_size))


def _embed(model: Model, shards: Sequence[str], batch_size: int) -> int:
    """Run `mmssl embed`; returns the number of images."""
    with tempfile.TemporaryDirectory() as folder:
        return embed_shards(model, shards, Path(folder) / "index", batch_size=batch_size).images


def _encode(model: Model, ready: Sequence[Tensor], images: int) -> None:
    """Encode a number of images, repeating the same batches."""
    for batch in cycle(ready):
        model.encode_rendered(batch[:images])
        images -= len(batch)
        if images <= 0:
            return
