"""One part of a batch: which samples, their bytes, their rendering, and a stand-in for each that is bad."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmssl.data.order.plan import Position, SampleRun, StreamPlan
from mmssl.data.shards.samples import BadSample, SampleError, SampleLimits, parse_sample
from mmssl.data.shards.urls import is_remote
from mmssl.data.sources.catalog import Catalog, SampleLocation
from mmssl.data.storage.blocks import Span
from mmssl.data.storage.files import Access, Files
from mmssl.errors import UserError
from mmssl.types import Sample

BAD_IN_A_ROW = 100
"""So many unusable samples in a row stop the stream."""


class RenderedSamples(Protocol):
    """What a rendering of n samples gives; the rows of `bad` samples hold anything."""

    @property
    def views(self) -> dict[str, Tensor]:
        """View name -> uint8 [n, 3, H, W]."""

    @property
    def texts(self) -> list[str]:
        """n captions."""

    @property
    def bad(self) -> list[tuple[int, str]]:
        """Index and error of each sample that could not be rendered."""

    @property
    def augment_params(self) -> dict[str, Tensor]:
        """View name -> numbers of its images' changes, float64 [n, ...], where these are still to be made."""


class Render(Protocol):
    """Decodes and augments samples; must be picklable for process workers and safe to call from several
    threads."""

    def __call__(self, samples: Sequence[Sample], epoch: int) -> RenderedSamples:
        """Render samples for an epoch."""


@dataclass(frozen=True)
class PartTask:
    """Samples [start, stop) of the global batch that begins at `position`."""

    position: Position
    batch_size: int
    start: int
    stop: int


@dataclass
class BatchPart:
    """Rendered samples of a task, n of them."""

    views: dict[str, Tensor]
    augment_params: dict[str, Tensor]
    texts: list[str]
    ids: list[int]
    keys: list[str]
    sources: list[int]
    """Samples of each source."""
    bytes: int = 0
    """Bytes read."""
    retries: int = 0
    """Remote reads taken up again."""
    bad: list[tuple[int, BadSample]] = field(default_factory=list)
    """Place in the part, and what was wrong there before a stand-in took it."""


class ReadMonitor:
    """Where a worker reads at the moment; lives in shared memory so that the training process can tell."""

    def __init__(self, workers: int) -> None:
        self.rows: Tensor = torch.zeros(workers, 3, dtype=torch.int64)
        self.rows.share_memory_()  # type: ignore[no-untyped-call]

    def row(self, worker: int) -> NDArray[np.int64]:
        """The worker's shard number, byte and start (monotonic nanoseconds, 0 when it does not read)."""
        row: NDArray[np.int64] = self.rows[worker].numpy()
        return row


class PartBuilder:
    """Makes parts. Without state of its own, so any worker may make any part."""

    def __init__(
        self, plan: StreamPlan, catalog: Catalog, render: Render, limits: SampleLimits, access: Access
    ) -> None:
        self.plan = plan
        self.catalog = catalog
        self.render = render
        self.limits = limits
        self.access = access
        self.shards = [index.shard for index in catalog.shards]
        self._remote = [catalog.is_remote(source) for source in range(len(catalog.sources))]

    def part(self, task: PartTask, files: Files, watch: NDArray[np.int64]) -> BatchPart:
        """Read and render a task's samples.

        Raises:
            UserError: a shard is gone, or no stand-in could be found for a bad sample.
        """
        runs = self.plan.runs(task.position, task.batch_size, task.start, task.stop)
        retries = files.retries
        for run in runs:
            if self._remote[run.source]:
                self._expect(files, run)
        part = _PartBuild(self, task.stop - task.start, files, watch).part(runs)
        part.retries = files.retries - retries
        return part

    def _expect(self, files: Files, run: SampleRun) -> None:
        """Fetch the blocks of a run and the one after them ahead of their use."""
        order = self.plan.order(run.source, run.epoch)
        first, last = (order.block_number(run.lane, depth) for depth in (run.start, run.stop - 1))
        reader, what = (run.source, run.lane), (run.epoch, first, last)
        if files.has_prefetched(reader, what):
            return
        locations = self.catalog.locations(run.source, order.block_samples(run.lane, first, last + 1))
        found = [(self.catalog.shards[place.shard], place) for place in locations]
        spans = [Span(shard, place.start, place.stop) for shard, place in found if is_remote(shard.shard)]
        files.prefetch(reader, what, spans)


class _PartBuild:
    """One part in the making."""

    def __init__(self, parent: PartBuilder, count: int, files: Files, watch: NDArray[np.int64]) -> None:
        self._parent = parent
        self._files = files
        self._watch = watch
        self._samples: list[Sample | None] = [None] * count
        self._bad: dict[int, BadSample] = {}
        self._pieces: list[tuple[list[int], list[int], RenderedSamples]] = []
        """Places in the part, rows of the rendering, the rendering."""
        self._bytes = 0

    def part(self, runs: Sequence[SampleRun]) -> BatchPart:
        for run in runs:
            locations = self._parent.catalog.locations(run.source, self._parent.plan.ids(run))
            for slot, place in zip(run.slots.tolist(), locations, strict=True):
                self._read(slot, place)
        for epoch in sorted({run.epoch for run in runs}):
            self._render(epoch, [slot for run in runs if run.epoch == epoch for slot in run.slots.tolist()])
        for run in runs:
            for step, slot in enumerate(run.slots.tolist()):
                if slot in self._bad:
                    self._stand_in(run, run.start + step, slot)
        samples = [sample for sample in self._samples if sample is not None]
        assert len(samples) == len(self._samples)
        sources = [0] * len(self._parent.plan.sources)
        for run in runs:
            sources[run.source] += len(run.slots)
        views, augment_params, texts = compose(self._pieces, len(samples))
        ids, keys = [s.id for s in samples], [f"{s.shard}:{s.key}" for s in samples]
        return BatchPart(views, augment_params, texts, ids, keys, sources, self._bytes, bad=sorted(self._bad.items()))

    def _read(self, slot: int, place: SampleLocation) -> str | None:
        """Fill a slot; the error where that fails."""
        index = self._parent.catalog.shards[place.shard]
        shard = index.shard
        self._watch[:] = place.shard, place.start, time.monotonic_ns()
        try:
            content = self._files.read(index, place.start, place.stop)
            self._samples[slot] = parse_sample(place.id, shard, content, self._parent.limits)
            self._bytes += len(content)
        except SampleError as error:
            self._bad.setdefault(slot, BadSample(shard, error.key or f"#{place.ordinal}", str(error)))
            return str(error)
        finally:
            self._watch[2] = 0
        return None

    def _render(self, epoch: int, slots: list[int]) -> None:
        slots = [slot for slot in slots if slot not in self._bad]
        samples = [sample for slot in slots if (sample := self._samples[slot]) is not None]
        if not samples:
            return
        rendered = self._parent.render(samples, epoch)
        for row, error in rendered.bad:
            self._bad[slots[row]] = BadSample(samples[row].shard, samples[row].key, error)
        good = [row for row, slot in enumerate(slots) if slot not in self._bad]
        self._pieces.append(([slots[row] for row in good], good, rendered))

    def _stand_in(self, run: SampleRun, depth: int, slot: int) -> None:
        plan, catalog = self._parent.plan, self._parent.catalog
        tried = 0
        for number in plan.stand_ins(run, depth, BAD_IN_A_ROW):
            tried += 1
            if self._read(slot, catalog.locations(run.source, np.array([number]))[0]) is not None:
                continue
            sample = self._samples[slot]
            assert sample is not None
            rendered = self._parent.render([sample], run.epoch)
            if not rendered.bad:
                self._pieces.append(([slot], [0], rendered))
                return
        bad = self._bad[slot]
        raise UserError(
            f"none of {tried} samples can stand in for {bad.key!r} of {bad.shard} ({bad.error}); "
            "run `mmssl shards check` on these shards"
        )


def compose(
    pieces: Sequence[tuple[list[int], list[int], RenderedSamples]], count: int
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """The pieces' rows in the order of their places: views, draws and texts."""
    slots, rows, rendered = pieces[0]
    if slots == rows == list(range(count)) and len(rendered.texts) == count:
        return rendered.views, rendered.augment_params, rendered.texts
    views, augment_params = (
        {name: torch.empty(count, *rows.shape[1:], dtype=rows.dtype) for name, rows in kept.items()}
        for kept in (rendered.views, rendered.augment_params)
    )
    texts = [""] * count
    for slots, rows, rendered in pieces:
        for whole, found in ((views, rendered.views), (augment_params, rendered.augment_params)):
            for name, values in found.items():
                whole[name][slots] = values[rows]
        for slot, row in zip(slots, rows, strict=True):
            texts[slot] = rendered.texts[row]
    return views, augment_params, texts
