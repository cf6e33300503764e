"""The training stream: rank-local batches in the plan's order, made ahead of time by threads or processes."""

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from mmssl.config import SourceConfig
from mmssl.data import patterns
from mmssl.data.assemble import BAD_IN_A_ROW, Assembler, Render
from mmssl.data.catalog import Catalog
from mmssl.data.grouping import Limits
from mmssl.data.index import Progress, ShardIndex, fingerprint, index_shards, report
from mmssl.data.pipeline import Joiner, Made, Pipeline, Tokenize
from mmssl.data.plan import Plan, PlannedSource, Position, Slices, default_lanes, default_slice_bytes
from mmssl.data.reader import BadSample
from mmssl.data.workers import Inline, Processes, Threads, Workers, cut
from mmssl.types import Batch, UserError

_FIRST = 1_000
"""The fraction of bad samples counts after so many."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """Shards that are read together, each sample once per epoch of the source."""

    shards: Sequence[str]
    weight: float = 1.0
    """Share of the batch relative to the other sources' weights."""


def sources_of(train: str | Sequence[str | SourceConfig], allow_pipe: bool = False) -> list[Source]:
    """The sources of a configuration's `data.train`: plain patterns together are one source of weight 1."""
    entries = [train] if isinstance(train, str) else list(train)
    plain = [entry for entry in entries if isinstance(entry, str)]
    weighted = [entry for entry in entries if isinstance(entry, SourceConfig)]
    sources = [Source(patterns.expand(plain, allow_pipe))] if plain or not weighted else []
    return sources + [Source(patterns.expand(s.shards, allow_pipe), s.weight) for s in weighted]


@dataclass
class Counters:
    """What this process has handed out since it started."""

    samples: int = 0
    bytes: int = 0
    """Encoded bytes read."""
    bad_samples: int = 0
    """Samples replaced by a stand-in."""
    wait_seconds: float = 0.0
    """Time the training loop waited for a batch."""
    source_samples: tuple[int, ...] = ()
    """Samples of each source: the realised mixture."""


class TrainStream:
    """Rank-local batches for ever, epoch after epoch.

    The order is a function of the shards, the seed and the shape of the plan (lanes, block, slices) alone:
    the global batches are the same for any world size and any number and kind of workers.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        seed: int,
        batch_size: int,
        render: Render,
        tokenize: Tokenize,
        lanes: int | None = None,
        shuffle_block: int = 8,
        slice_mib: float | None = None,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        worker_kind: Literal["thread", "process"] = "thread",
        limits: Limits | None = None,
        max_bad_fraction: float = 0.01,
        bad_log: Path | None = None,
        batches_ahead: int = 2,
        stall_seconds: float = 60.0,
        pin_memory: bool = False,
        index_progress: Progress | None = None,
    ) -> None:
        """Index the sources and plan their order; workers start with the first batch.

        Raises:
            UserError: a shard cannot be read, no sample is usable, or the batch does not fit the data or the
            world.
        """
        if batch_size % world:
            raise UserError(
                f"data.batch_size={batch_size} is not divisible by {world} processes; use a multiple"
            )
        self._limits = limits or Limits()
        indexes = [index_shards(s.shards, self._limits, progress=index_progress) for s in sources]
        found = report([index for source in indexes for index in source])
        if found is not None and rank == 0:
            _log.warning("%s", found)
        self._catalog = Catalog(indexes)
        self._planned = [_plan_source(s, i, slice_mib) for s, i in zip(sources, indexes, strict=True)]
        self._seed = seed
        self._block = shuffle_block
        self._batch_size = batch_size
        self._plan = self._make_plan(lanes or default_lanes(batch_size))
        self._share = (batch_size * rank // world, batch_size * (rank + 1) // world)
        self._render = render
        self._joiner = Joiner(tokenize, pin_memory)
        self._workers = workers
        self._worker_kind = worker_kind
        self._ahead = batches_ahead
        self._stall_seconds = stall_seconds
        self._position = Position()
        self._judge = _Judge(max_bad_fraction, bad_log)
        self._counters = Counters(source_samples=(0,) * len(sources))
        self._pipeline: Pipeline | None = None

    @property
    def samples(self) -> int:
        """Usable samples of all sources."""
        return sum(source.samples for source in self._planned)

    @property
    def batches_per_epoch(self) -> int:
        """Global batches of an epoch."""
        return self._plan.batches_per_epoch(self._batch_size)

    @property
    def samples_per_epoch(self) -> int:
        """Samples that an epoch hands out over all processes."""
        return self.batches_per_epoch * self._batch_size

    def counters(self) -> Counters:
        """What has been handed out so far."""
        return self._counters

    def state_dict(self) -> dict[str, int | str]:
        """The position after the last batch handed out: valid for any world size and workers."""
        return self._plan.state(self._position)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on at a state's next sample. Its lanes are taken over; they must divide the batch.

        Raises:
            UserError: the state belongs to other data or another seed.
        """
        self.close()
        if isinstance(state.get("lanes"), int) and state["lanes"] > 0:
            self._plan = self._make_plan(state["lanes"])
        self._position = self._plan.position(state)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        begin = time.monotonic()
        try:
            if self._pipeline is None:
                self._pipeline = self._start()
            made = self._pipeline.next()
            self._position = made.after
            self._judge.take(made)
        except BaseException:
            self.close()
            raise
        counters = self._counters
        counters.samples += len(made.batch)
        counters.bytes += made.bytes
        counters.bad_samples += len(made.bad)
        counters.source_samples = tuple(map(sum, zip(counters.source_samples, made.sources, strict=True)))
        counters.wait_seconds += time.monotonic() - begin
        return made.batch

    def __enter__(self) -> "TrainStream":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the workers. Iterating again goes on after the last batch handed out."""
        if self._pipeline is not None:
            self._pipeline.close()
            self._pipeline = None

    def _make_plan(self, lanes: int) -> Plan:
        plan = Plan(self._planned, seed=self._seed, lanes=lanes, block=self._block)
        plan.check(self._batch_size)
        return plan

    def _start(self) -> Pipeline:
        depth = self._batch_size // self._plan.lanes
        cuts = cut(*self._share, depth, max(1, self._workers))
        assembler = Assembler(self._plan, self._catalog, self._render, self._limits)
        workers: Workers
        if self._workers == 0:
            workers = Inline(assembler, self._batch_size, cuts)
        elif self._worker_kind == "thread":
            workers = Threads(assembler, self._batch_size, cuts)
        else:
            workers = Processes(assembler, self._batch_size, cuts, self._position, self._ahead)
        return Pipeline(
            workers,
            self._joiner,
            self._plan,
            self._batch_size,
            self._position,
            ahead=self._ahead if self._workers > 0 else 0,
            shards=[index.shard for index in self._catalog.shards],
            stall_seconds=self._stall_seconds,
        )


class _Judge:
    """Writes bad samples down and stops the stream when they are too many."""

    def __init__(self, max_fraction: float, log: Path | None) -> None:
        self._max_fraction = max_fraction
        self._log = log
        self._samples = 0
        self._bad = 0
        self._in_a_row = 0

    def take(self, made: Made) -> None:
        """Count a batch.

        Raises:
            UserError: more than the fraction of all samples so far, or 100 in a row, were bad.
        """
        self._write(made)
        self._samples += len(made.batch)
        self._bad += len(made.bad)
        previous = -1
        for place, bad in made.bad:
            self._in_a_row = self._in_a_row + 1 if place == previous + 1 else 1
            previous = place
            if self._in_a_row >= BAD_IN_A_ROW:
                raise UserError(
                    f"{BAD_IN_A_ROW} samples in a row could not be used, the last one {self._name(bad)}"
                )
        if previous != len(made.batch) - 1:
            self._in_a_row = 0
        if self._samples >= _FIRST and self._bad > self._max_fraction * self._samples:
            raise UserError(
                f"{self._bad} of {self._samples} samples could not be used, more than data.bad_samples="
                f"{self._max_fraction}; the last one {self._name(made.bad[-1][1])}"
            )

    def _name(self, bad: BadSample) -> str:
        where = "" if self._log is None else f"; all are in {self._log}"
        return f"is {bad.key!r} of {bad.shard} ({bad.error}){where}; run `mmssl shards check` on these shards"

    def _write(self, made: Made) -> None:
        if self._log is None or not made.bad:
            return
        with self._log.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(bad)) + "\n" for _, bad in made.bad)


def _plan_source(source: Source, indexes: Sequence[ShardIndex], slice_mib: float | None) -> PlannedSource:
    counts = [index.samples for index in indexes]
    if sum(counts) == 0:
        found = report(indexes) or "they are empty"
        raise UserError(f"no usable sample in {source.shards[0]} and its {len(counts) - 1} fellows: {found}")
    sizes = [index.bytes for index in indexes]
    slice_bytes = default_slice_bytes(sum(sizes)) if slice_mib is None else max(1, int(slice_mib * 2**20))
    return PlannedSource(Slices.cut(counts, sizes, slice_bytes), source.weight, fingerprint(indexes))
