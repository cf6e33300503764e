"""Features of images and texts, in batches. All evaluation after this works on features alone.

With several ranks, each reads all records, encodes every world-size-th batch, and ends with all features. The batches
are those of a single rank, so the features are equal to the last bit.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F

from mmssl import system
from mmssl.data.shards import BadSample
from mmssl.distributed import World
from mmssl.errors import UserError
from mmssl.evaluate.prompts import Templates, fill
from mmssl.types import Sample

T = TypeVar("T")
Progress = Callable[[str, int], None]
"""Callback: name of the work, number of items done."""
ALONE = World()
"""A single rank."""
AHEAD = 2
"""Batches rendered ahead while an accelerator encodes one. A CPU alternates, as both take all cores."""


class Encoder(Protocol):
    """The model under evaluation: two functions into one space. `mmssl.load` returns one."""

    def encode_image(self, images: Sequence[bytes]) -> Tensor:
        """Encoded images (JPEG, PNG, ...) -> features [N, D]. ValueError or OSError: one is unreadable."""
        ...

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Texts -> features [N, D]."""
        ...


@runtime_checkable
class RenderingEncoder(Encoder, Protocol):
    """An encoder whose images other threads can decode while it encodes the previous batch."""

    def render(self, image: bytes) -> Tensor:
        """An encoded image -> the model's input, uint8 [3, S, S]. ValueError or OSError: it is unreadable."""
        ...

    def encode_rendered(self, images: Tensor) -> Tensor:
        """Rendered images [N, 3, S, S] -> features [N, D], the same as `encode_image`'s."""
        ...


@dataclass(frozen=True)
class EncodedImages:
    """The images of a dataset as features."""

    features: Tensor
    """Unit vectors, float32 on the CPU, [N, D]."""
    samples: list[Sample]
    """The records of the rows, without image bytes."""
    bad: list[BadSample]
    """Samples that could not be encoded."""


@dataclass
class _Part:
    """Rows that one rank encoded."""

    places: list[int] = field(default_factory=list)
    """Indices of its rows among all rows."""
    rows: list[Tensor] = field(default_factory=list)
    """Unit vectors, [n, D] per batch."""
    bad: list[BadSample] = field(default_factory=list)


@dataclass(frozen=True)
class _Features:
    """Features of a batch."""

    rows: Tensor
    """[n, D]."""
    usable: list[int]
    """Their n samples in the batch."""


def encode_images(
    encoder: Encoder,
    samples: Iterable[Sample],
    *,
    batch_size: int = 256,
    world: World = ALONE,
    progress: Progress | None = None,
    required: bool = True,
) -> EncodedImages:
    """Encode every image once, in order. Every rank passes the same samples and gets the same features.

    An image that cannot be decoded is left out and kept in `bad`.

    Args:
        required: refuse samples of which none is usable. False: they have features [0, 0].

    Raises:
        UserError: the shards are empty, no image can be encoded, or a feature is not finite.
    """
    records: list[Sample] = []
    part = _Part()
    problem = None
    try:
        for batch, found in _encoded(encoder, samples, batch_size, world, part.bad):
            if found is not None:
                _keep(found, batch, len(records), part)
            records.extend(replace(sample, image=b"", more_images=(), mask=b"") for sample in batch)
            if progress is not None:
                progress("images", len(records))
        if required and not records:
            raise UserError("no sample to evaluate: the shards are empty; give shards with samples")
    except UserError as error:
        # Raised on all ranks below: a rank that stopped alone would leave the others waiting.
        problem = str(error)
    problems = gather_values(world, problem)
    if any(p is not None for p in problems):
        raise UserError(next(p for p in problems if p is not None))
    if required and not any(gather_values(world, len(part.places))):
        reason = next(entry[2] for entries in gather_values(world, _as_lists(part.bad)) for entry in entries)
        raise UserError(f"no image from {records[0].shard}:{records[0].key} on could be encoded: {reason}")
    features, known = _join(world, part, len(records))
    bad = [BadSample(*entry) for entries in gather_values(world, _as_lists(part.bad)) for entry in entries]
    return EncodedImages(features[known], [s for s, there in zip(records, known.tolist(), strict=True) if there], bad)


def encode_texts(
    encoder: Encoder,
    texts: Sequence[str],
    *,
    batch_size: int = 256,
    world: World = ALONE,
    progress: Progress | None = None,
) -> Tensor:
    """Encode every text, in order: unit vectors, float32 on the CPU, [N, D], N >= 1. Every rank gets all.

    Raises:
        UserError: a feature is not finite.
    """
    part = _Part()
    for number, start in enumerate(range(0, len(texts), batch_size)):
        stop = min(start + batch_size, len(texts))
        if number % world.size == world.rank:
            with torch.no_grad():
                part.rows.append(F.normalize(encoder.encode_text(texts[start:stop]).float().cpu(), dim=-1))
            part.places.extend(range(start, stop))
        if progress is not None:
            progress("texts", stop)
    features = _join(world, part, len(texts))[0]
    finite = features.isfinite().all(dim=1)
    if not bool(finite.all()):
        text = texts[int((~finite).nonzero()[0])]
        raise UserError(f"the features of the text {text[:80]!r} are not finite; the model's weights are broken")
    return features


def class_weights(
    encoder: Encoder,
    classnames: Sequence[str],
    templates: Templates,
    *,
    batch_size: int = 256,
    world: World = ALONE,
    progress: Progress | None = None,
) -> Tensor:
    """One unit vector per class: the mean of its prompts' unit vectors, normalized again. [C, D]."""
    prompts = fill(classnames, templates)
    texts = [text for entries in prompts for text in entries]
    owner = torch.tensor([index for index, entries in enumerate(prompts) for _ in entries])
    features = encode_texts(encoder, texts, batch_size=batch_size, world=world, progress=progress)
    totals = torch.zeros(len(prompts), features.shape[1]).index_add_(0, owner, features)
    counts = torch.tensor([len(entries) for entries in prompts])[:, None]
    return F.normalize(totals / counts, dim=-1)


def gather_values(world: World, value: T) -> list[T]:
    """The values of all ranks, in rank order."""
    return [world.broadcast(value, source) for source in range(world.size)]


def _encoded(
    encoder: Encoder, samples: Iterable[Sample], batch_size: int, world: World, bad: list[BadSample]
) -> Iterator[tuple[list[Sample], _Features | None]]:
    """Every batch in order, with its features if this rank encodes it and an image of it is usable."""
    rank, world_size = world.rank, world.size
    if not isinstance(encoder, RenderingEncoder):
        for number, batch in enumerate(_batches(samples, batch_size)):
            yield batch, _encode(encoder, batch, bad) if number % world_size == rank else None
        return
    ahead = 0 if getattr(encoder, "device", torch.device("cpu")).type == "cpu" else AHEAD
    pool = ThreadPoolExecutor(len(system.allowed_cores()))
    try:
        # Images go to the threads one by one as they are read.
        rendered = (
            (sample, pool.submit(encoder.render, sample.image) if index // batch_size % world_size == rank else None)
            for index, sample in enumerate(samples)
        )
        waiting: deque[list[tuple[Sample, Future[Tensor] | None]]] = deque()
        for pairs in _batches(rendered, batch_size):
            waiting.append(pairs)
            if len(waiting) > ahead:
                yield _finished(encoder, waiting.popleft(), bad)
        while waiting:
            yield _finished(encoder, waiting.popleft(), bad)
    finally:
        # Images that are queued are not waited for when an error or a signal ends this.
        pool.shutdown(cancel_futures=True)


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    stream = iter(items)
    while batch := list(islice(stream, size)):
        yield batch


def _finished(
    encoder: RenderingEncoder, pairs: Sequence[tuple[Sample, Future[Tensor] | None]], bad: list[BadSample]
) -> tuple[list[Sample], _Features | None]:
    """Encode a batch once its images are rendered; None for a batch of another rank, or without a usable image."""
    batch = [sample for sample, _ in pairs]
    images, usable = [], []
    for index, (sample, future) in enumerate(pairs):
        if future is None:
            return batch, None
        try:
            images.append(future.result())
            usable.append(index)
        except (ValueError, OSError) as error:
            bad.append(BadSample(sample.shard, sample.key, str(error)))
    if not usable:
        return batch, None
    with torch.no_grad():
        return batch, _Features(encoder.encode_rendered(torch.stack(images)), usable)


def _encode(encoder: Encoder, batch: list[Sample], bad: list[BadSample]) -> _Features | None:
    """Encode a batch; if it fails, one by one, so that only the broken image is lost and named."""
    with torch.no_grad():
        try:
            return _Features(encoder.encode_image([sample.image for sample in batch]), list(range(len(batch))))
        except (ValueError, OSError):
            return _one_by_one(encoder, batch, bad)


def _one_by_one(encoder: Encoder, batch: list[Sample], bad: list[BadSample]) -> _Features | None:
    usable, features = [], []
    for index, sample in enumerate(batch):
        try:
            features.append(encoder.encode_image([sample.image]))
            usable.append(index)
        except (ValueError, OSError) as error:
            bad.append(BadSample(sample.shard, sample.key, str(error)))
    return _Features(torch.cat(features), usable) if usable else None


def _keep(found: _Features, batch: list[Sample], start: int, part: _Part) -> None:
    """Add the features of a batch, whose first sample has index `start`.

    Raises:
        UserError: a feature is not finite.
    """
    features = F.normalize(found.rows.float().cpu(), dim=-1)
    finite = features.isfinite().all(dim=1)
    if not bool(finite.all()):
        sample = batch[found.usable[int((~finite).nonzero()[0])]]
        raise UserError(f"the features of {sample.shard}:{sample.key} are not finite; the model's weights are broken")
    part.rows.append(features)
    part.places.extend(start + index for index in found.usable)


def _join(world: World, part: _Part, total: int) -> tuple[Tensor, Tensor]:
    """The rows of all ranks in order [total, D], and True for each row that exists, bool [total]."""
    # A rank without a usable image does not know the width.
    width = max(gather_values(world, part.rows[0].shape[1] if part.rows else 0))
    rows, known = torch.zeros(total, width), torch.zeros(total)
    if part.rows:
        rows[part.places] = torch.cat(part.rows)
        known[part.places] = 1
    # Adding the zeros of the other ranks changes no bit.
    return world.sum(rows), world.sum(known) > 0


def _as_lists(bad: Sequence[BadSample]) -> list[list[str]]:
    return [[b.shard, b.key, b.error] for b in bad]
