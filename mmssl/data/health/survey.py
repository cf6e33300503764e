"""One pass over every sample of shards: what its image and its caption are like."""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import numpy.typing as npt

from mmssl.data.health.duplicates import thumbnail
from mmssl.data.shards.samples import BadSample, SampleLimits
from mmssl.data.storage.sequential import iter_samples
from mmssl.data.transforms import DecodeError, Pixels, captions, decoding
from mmssl.errors import UserError
from mmssl.types import Sample

_BATCH = 64
_SEEN_SIDE = 48
"""A reduced decode keeps at least this many pixels a side: enough for a thumbnail."""


@dataclass
class Survey:
    """What was seen of N usable samples, in file order, and of the others."""

    keys: list[str] = field(default_factory=list)
    """`shard:key` of each."""
    shards: list[str] = field(default_factory=list)
    """The shard of each."""
    captions: list[str] = field(default_factory=list)
    """The first template's caption of each, cleaned."""
    formats: list[str] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    """Width and height of each image."""
    image_bytes: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    """BLAKE2b-128 of each encoded image."""
    thumbnails: list[Pixels] = field(default_factory=list)
    """uint8 [12, 12, 3] each."""
    bad: list[BadSample] = field(default_factory=list)
    """Samples that training would leave out, or replace, and why."""
    problems: list[str] = field(default_factory=list)
    """What is wrong with whole shards, where their index tells."""

    def __len__(self) -> int:
        return len(self.keys)

    def sides(self) -> npt.NDArray[np.int64]:
        """Widths and heights, int64 [N, 2]."""
        return np.array(self.sizes, dtype=np.int64).reshape(-1, 2)


@dataclass(frozen=True)
class _Seen:
    """One sample's part of a survey."""

    caption: str
    header: decoding.Header
    digest: bytes
    thumbnail: Pixels


Looked = list[tuple[Sample, _Seen | str]]
Look = Callable[[list[Sample]], Looked]


def survey(
    shards: Sequence[str],
    *,
    template: str = "{txt}",
    limits: SampleLimits | None = None,
    max_pixels: int = decoding.MAX_PIXELS,
    first: int | None = None,
    problems: Sequence[str] = (),
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Survey:
    """Read, decode and caption the samples of shards, all of them or the `first` so many.

    `problems` are those of whole shards that an index found; `progress` is called with the number of samples read so
    far.

    Raises:
        UserError: a shard cannot be opened.
    """
    found = Survey(problems=list(problems))
    samples = islice(iter_samples(shards, limits, on_bad=found.bad.append), first)
    done, workers = 0, threads or os.cpu_count() or 1

    def look(batch: list[Sample]) -> Looked:
        return [(sample, _look(sample, template, max_pixels)) for sample in batch]

    with ThreadPoolExecutor(workers) as pool:
        for batch in _ahead(pool, look, _batches(samples), 2 * workers):
            for sample, seen in batch:
                _take(found, sample, seen)
            done += len(batch)
            if progress is not None:
                progress(done)
    return found


def _take(found: Survey, sample: Sample, seen: _Seen | str) -> None:
    if isinstance(seen, str):
        found.bad.append(BadSample(sample.shard, sample.key, seen))
        return
    found.keys.append(f"{sample.shard}:{sample.key}")
    found.shards.append(sample.shard)
    found.captions.append(seen.caption)
    found.formats.append(seen.header.format)
    found.sizes.append((seen.header.width, seen.header.height))
    found.image_bytes.append(len(sample.image))
    found.digests.append(seen.digest)
    found.thumbnails.append(seen.thumbnail)


def _look(sample: Sample, template: str, max_pixels: int) -> _Seen | str:
    """What a sample is like, or why it cannot be used."""
    try:
        caption = captions.clean_caption(captions.render_caption(sample.fields, [template], None))
        header = decoding.read_header(sample.image, max_pixels)
        side = min(header.width, header.height)
        reduce = next((r for r in decoding.REDUCTIONS if side >= r * _SEEN_SIDE), 1)
        small = thumbnail(decoding.decode(sample.image, header, reduce))
    except (DecodeError, UserError) as error:
        return str(error)
    if not caption:
        return "the caption is empty"
    return _Seen(caption, header, hashlib.blake2b(sample.image, digest_size=16).digest(), small)


def _batches(samples: Iterable[Sample]) -> Iterator[list[Sample]]:
    iterator = iter(samples)
    while batch := list(islice(iterator, _BATCH)):
        yield batch


def _ahead(pool: Executor, work: Look, batches: Iterable[list[Sample]], ahead: int) -> Iterator[Looked]:
    """Results in order, with a few batches in work ahead: the rest of the shards stays unread."""
    pending: deque[Future[Looked]] = deque()
    for batch in batches:
        pending.append(pool.submit(work, batch))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
