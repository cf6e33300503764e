"""One pass over all samples of shards that collects what the health report needs."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from mmssl.data.health.duplicates import Fingerprint, KnownImages, fingerprint
from mmssl.data.shards import BadSample, SampleLimits
from mmssl.data.shards.causes import join_bad
from mmssl.data.storage import iter_samples
from mmssl.data.transforms import DecodeError, Pixels, captions, decoding
from mmssl.errors import UserError
from mmssl.types import Sample

_BATCH = 64


@dataclass
class Survey:
    """Properties of N usable samples, in file order, and the unusable ones."""

    keys: list[str] = field(default_factory=list)
    """`shard:key` of each sample."""
    shards: list[str] = field(default_factory=list)
    """Shard of each sample."""
    captions: list[str] = field(default_factory=list)
    """Cleaned caption of each sample."""
    formats: list[str] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    """Width and height of each image."""
    image_bytes: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    """BLAKE2b-128 of each encoded image."""
    thumbnails: list[Pixels] = field(default_factory=list)
    """Thumbnail of each image, uint8 [12, 12, 3]."""
    bad: list[BadSample] = field(default_factory=list)
    """Samples that training would skip or replace, with their errors."""
    image_counts: list[int] = field(default_factory=list)
    """Number of images of each sample; the other lists are about its first."""
    caption_counts: list[int] = field(default_factory=list)
    """Number of captions of each sample, of which training draws one; the other lists are about its first."""
    problems: list[str] = field(default_factory=list)
    """Problems of whole shards, from their index."""

    def __len__(self) -> int:
        return len(self.keys)

    def sides(self) -> npt.NDArray[np.int64]:
        """Widths and heights, int64 [N, 2]."""
        return np.array(self.sizes, dtype=np.int64).reshape(-1, 2)


@dataclass(frozen=True)
class _SampleInfo:
    """Properties of one usable sample."""

    caption: str
    header: decoding.Header
    image: Fingerprint
    caption_count: int


Info = TypeVar("Info")
Inspect = Callable[[list[Sample]], Info]


def survey_shards(
    shards: Sequence[str],
    *,
    template: str = "{txt}",
    limits: SampleLimits | None = None,
    first: int | None = None,
    problems: Sequence[str] = (),
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Survey:
    """Read and decode the samples of shards.

    Args:
        first: number of samples to read. None: all.
        problems: problems of whole shards, as found by indexing.
        progress: called with the number of samples read so far.

    Raises:
        UserError: a shard cannot be opened.
    """
    found = Survey(problems=list(problems))
    bad: list[BadSample] = []
    samples = islice(iter_samples(shards, limits, on_bad=bad.append), first)
    done, workers = 0, threads or os.cpu_count() or 1

    def inspect(batch: list[Sample]) -> list[tuple[Sample, _SampleInfo | str]]:
        return [(sample, _inspect(sample, template)) for sample in batch]

    with ThreadPoolExecutor(workers) as pool:
        for batch in _run_ahead(pool, inspect, samples, 2 * workers):
            for sample, info in batch:
                _add(found, bad, sample, info)
            done += len(batch)
            if progress is not None:
                progress(done)
    found.bad = join_bad(sample for sample in bad if sample.key)
    damaged = {shard for shard in shards if any(problem.startswith(f"{shard}: ") for problem in problems)}
    found.problems += [f"{b.shard}: {b.error}" for b in bad if not b.key and b.shard not in damaged]
    return found


def read_known_images(
    shards: Sequence[str], limits: SampleLimits | None = None, progress: Callable[[int], None] | None = None
) -> KnownImages:
    """The images of shards that can be decoded, with or without captions.

    Raises:
        UserError: a shard cannot be opened.
    """

    def inspect(batch: list[Sample]) -> list[tuple[str, Fingerprint]]:
        found = []
        for sample in batch:
            with suppress(DecodeError):  # nothing can be a copy of it
                image = fingerprint(sample.image, decoding.read_header(sample.image))
                found.append((f"{sample.shard}:{sample.key}", image))
        return found

    keys: list[str] = []
    images: list[Fingerprint] = []
    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        for batch in _run_ahead(pool, inspect, iter_samples(shards, limits, need_text=False), 2 * workers):
            keys += [key for key, _ in batch]
            images += [image for _, image in batch]
            if progress is not None:
                progress(len(keys))
    return KnownImages(keys, images)


def _add(found: Survey, bad: list[BadSample], sample: Sample, info: _SampleInfo | str) -> None:
    if isinstance(info, str):
        bad.append(BadSample(sample.shard, sample.key, info))
        return
    found.keys.append(f"{sample.shard}:{sample.key}")
    found.shards.append(sample.shard)
    found.captions.append(info.caption)
    found.formats.append(info.header.format)
    found.sizes.append((info.header.width, info.header.height))
    found.image_bytes.append(len(sample.image))
    found.image_counts.append(1 + len(sample.more_images))
    found.caption_counts.append(info.caption_count)
    found.digests.append(info.image.digest)
    found.thumbnails.append(info.image.thumbnail)


def _inspect(sample: Sample, template: str) -> _SampleInfo | str:
    """Properties of a sample, or the error that makes it unusable."""
    try:
        text = captions.render_caption(sample.fields, [template], None)
        if (problem := captions.length_problem(text)) is not None:
            return problem
        caption = captions.clean_caption(text)
        header = decoding.read_header(sample.image)
        image = fingerprint(sample.image, header)
        for further in sample.more_images:
            decoding.decode(further, decoding.read_header(further), max(decoding.REDUCTIONS))
        count = len(captions.every_caption(sample.fields, template))
    except (DecodeError, UserError) as error:
        return str(error)
    if not caption:
        return "the caption is empty"
    return _SampleInfo(caption, header, image, count)


def _batches(samples: Iterable[Sample]) -> Iterator[list[Sample]]:
    iterator = iter(samples)
    while batch := list(islice(iterator, _BATCH)):
        yield batch


def _run_ahead(pool: Executor, work: Inspect[Info], samples: Iterable[Sample], ahead: int) -> Iterator[Info]:
    """Results of batches, in order. At most `ahead` are in work, so that shards are not read far ahead."""
    pending: deque[Future[Info]] = deque()
    for batch in _batches(samples):
        pending.append(pool.submit(work, batch))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
