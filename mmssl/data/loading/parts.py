"""Parts of a batch by the plan: which samples, their bytes, their rendering, and a stand-in for each bad one."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mmssl.data.order import Position, SampleRun, StreamPlan
from mmssl.data.shards import BadSample, SampleLimits, is_remote
from mmssl.data.shards.causes import remedy_of
from mmssl.data.shards.samples import SampleError, parse_sample
from mmssl.data.sources.catalog import Catalog, SampleLocation
from mmssl.data.storage import Access, Files, Span
from mmssl.data.transforms import Rendered
from mmssl.errors import UserError
from mmssl.types import Sample

BAD_IN_A_ROW = 100
"""Consecutive unusable samples that stop the stream."""
Render = Callable[[Sequence[Sample], int], Rendered]
"""Renders samples for an epoch. Picklable for process workers, and safe to call from several threads."""


@dataclass(frozen=True)
class PartTask:
    """Samples [start, stop) of every global batch of `batch_size` samples."""

    batch_size: int
    start: int
    stop: int


@dataclass
class BatchPart:
    """The n rendered samples of a task."""

    views: dict[str, Tensor]
    augment_params: dict[str, Tensor]
    groups: dict[str, Tensor]
    texts: list[str]
    more_texts: list[list[str]]
    """The second captions of all samples, the third ones, ..."""
    readings: dict[str, list[str]]
    """Template -> captions of all samples by it."""
    ids: list[int]
    keys: list[str]
    sources: list[int]
    """Samples of each source."""
    bytes: int = 0
    """Bytes read."""
    retries: int = 0
    """Remote reads that were resumed."""
    bad: list[tuple[int, BadSample]] = field(default_factory=list)
    """Slot in the part and the bad sample that was replaced there."""


class PartAssembly:
    """A part while it is made: samples by slot, their renderings, and the bad samples met."""

    def __init__(self, render: Render, slots: int) -> None:
        self.samples: list[Sample | None] = [None] * slots
        self.bad: list[tuple[int, BadSample]] = []
        self._render = render
        self._pieces: list[tuple[list[int], list[int], Rendered]] = []
        """Slots, rows of the rendering, the rendering."""

    def render(self, epoch: int, slots: Sequence[int]) -> dict[int, BadSample]:
        """Render the samples in `slots`. Returns those that failed, by slot."""
        samples = [sample for slot in slots if (sample := self.samples[slot]) is not None]
        if not samples:
            return {}
        rendered = self._render(samples, epoch)
        failed = {slots[row]: BadSample(samples[row].shard, samples[row].key, error) for row, error in rendered.bad}
        rows = [row for row, slot in enumerate(slots) if slot not in failed]
        if rows:
            self._pieces.append(([slots[row] for row in rows], rows, rendered))
        return failed

    def finish(self, sources: list[int], read_bytes: int, retries: int) -> BatchPart:
        """The part, once every slot is rendered."""
        samples = [sample for sample in self.samples if sample is not None]
        assert len(samples) == len(self.samples)
        composed = compose(self._pieces, len(samples))
        return BatchPart(
            composed.views,
            composed.augment_params,
            composed.groups,
            composed.texts,
            composed.more_texts,
            composed.readings,
            ids=[sample.id for sample in samples],
            keys=[f"{sample.shard}:{sample.key}" for sample in samples],
            sources=sources,
            bytes=read_bytes,
            retries=retries,
            bad=sorted(self.bad, key=lambda bad: bad[0]),
        )


class PartBuilder:
    """Builds parts by a plan. Stateless, so any worker may build any part."""

    def __init__(
        self, plan: StreamPlan, catalog: Catalog, render: Render, limits: SampleLimits, access: Access
    ) -> None:
        self.plan = plan
        self.access = access
        self.shards = [index.shard for index in catalog.shards]
        self._catalog = catalog
        self._render = render
        self._limits = limits
        self._remote = [catalog.is_remote(source) for source in range(len(catalog.sources))]

    def part(self, position: Position, task: PartTask, files: Files) -> BatchPart:
        """Read and render a task's samples of the batch that begins at `position`.

        Raises:
            UserError: a shard is gone, or no stand-in was found for a bad sample.
        """
        runs = self.plan.runs(position, task.batch_size, task.start, task.stop)
        retries, read_bytes = files.retries, files.sample_bytes
        for run in runs:
            if self._remote[run.source]:
                self._prefetch(files, run)
        assembly, bad = PartAssembly(self._render, task.stop - task.start), dict[int, BadSample]()
        sources = [0] * len(self.plan.sources)
        for run in runs:
            sources[run.source] += len(run.slots)
            locations = self._catalog.locations(run.source, self.plan.ids(run))
            for slot, location in zip(run.slots.tolist(), locations, strict=True):
                found = self._read(location, files)
                if isinstance(found, Sample):
                    assembly.samples[slot] = found
                else:
                    bad[slot] = found
        for epoch in sorted({run.epoch for run in runs}):
            slots = [slot for run in runs if run.epoch == epoch for slot in run.slots.tolist() if slot not in bad]
            bad |= assembly.render(epoch, slots)
        for run in runs:
            for depth, slot in enumerate(run.slots.tolist(), start=run.start):
                if slot in bad:
                    self._stand_in(assembly, run, depth, (slot, bad[slot]), files)
        assembly.bad = list(bad.items())
        return assembly.finish(sources, files.sample_bytes - read_bytes, files.retries - retries)

    def _prefetch(self, files: Files, run: SampleRun) -> None:
        """Start fetching the blocks of a run and the block after them."""
        order = self.plan.order(run.source, run.epoch)
        first, last = (order.block_number(run.lane, depth) for depth in (run.start, run.stop - 1))
        reader, blocks = (run.source, run.lane), (run.epoch, first, last)
        if files.has_prefetched(reader, blocks):
            return
        locations = self._catalog.locations(run.source, order.block_samples(run.lane, first, last + 1))
        found = [(self._catalog.shards[location.shard], location) for location in locations]
        spans = [Span(index, location.start, location.stop) for index, location in found if is_remote(index.shard)]
        files.prefetch(reader, blocks, spans)

    def _read(self, location: SampleLocation, files: Files) -> Sample | BadSample:
        index = self._catalog.shards[location.shard]
        files.reading[:] = location.shard, location.start, time.monotonic_ns()
        try:
            content = files.read_sample(index, location.start, location.stop)
            return parse_sample(location.id, index.shard, content, self._limits)
        except SampleError as error:
            return BadSample(index.shard, error.key or f"#{location.ordinal}", str(error))
        finally:
            files.reading[2] = 0

    def _stand_in(
        self, assembly: PartAssembly, run: SampleRun, depth: int, bad: tuple[int, BadSample], files: Files
    ) -> None:
        """Replace the bad sample of a slot by a good one."""
        slot, replaced = bad
        tried = 0
        for number in self.plan.stand_ins(run, depth, BAD_IN_A_ROW):
            tried += 1
            (location,) = self._catalog.locations(run.source, np.array([number]))
            found = self._read(location, files)
            if isinstance(found, BadSample):
                continue
            assembly.samples[slot] = found
            if not assembly.render(run.epoch, [slot]):
                return
        remedy = f"{known}; or " if (known := remedy_of(replaced.error)) else ""
        raise UserError(
            f"none of {tried} samples can stand in for {replaced.key!r} of {replaced.shard} ({replaced.error}); "
            f"{remedy}run `mmssl shards check` on these shards"
        )


def compose(pieces: Sequence[tuple[list[int], list[int], Rendered]], count: int) -> Rendered:
    """Views, parameters, groups and captions of all pieces, in the order of their slots."""
    slots, rows, rendered = pieces[0]
    if slots == rows == list(range(count)) and len(rendered.texts) == count:
        return rendered
    views, augment_params, groups = (
        {name: torch.empty(count, *rows.shape[1:], dtype=rows.dtype) for name, rows in kept.items()}
        for kept in (rendered.views, rendered.augment_params, rendered.groups)
    )
    texts, *more_texts = ([""] * count for _ in (None, *rendered.more_texts))
    readings = {template: [""] * count for template in rendered.readings}
    for slots, rows, rendered in pieces:
        parts = ((views, rendered.views), (augment_params, rendered.augment_params), (groups, rendered.groups))
        for composed, found in parts:
            for name, values in found.items():
                composed[name][slots] = values[rows]
        for slot, row in zip(slots, rows, strict=True):
            texts[slot] = rendered.texts[row]
            for kept, found_texts in zip(more_texts, rendered.more_texts, strict=True):
                kept[slot] = found_texts[row]
            for template, found_texts in rendered.readings.items():
                readings[template][slot] = found_texts[row]
    return Rendered(views, texts, [], augment_params, groups, more_texts, readings)
