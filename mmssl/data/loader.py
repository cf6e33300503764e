"""The training stream: rank-local batches in the plan's order, made ahead of time by threads or processes."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmssl.config import SourceConfig
from mmssl.data.loading.parts import PartBuilder, Render
from mmssl.data.loading.pipeline import BadSampleBudget, PartJoiner, Pipeline, Tokenize
from mmssl.data.loading.unindexed import NOT_PROMISED, UnindexedBuilder, UnindexedPlan, unindexed_lanes
from mmssl.data.loading.workers import InlineWorkers, ProcessWorkers, ThreadWorkers, Workers, split_tasks
from mmssl.data.order.plan import PlannedSource, Position, StreamPlan, default_lanes
from mmssl.data.shards.index import Progress, describe_problems
from mmssl.data.shards.samples import SampleLimits
from mmssl.data.shards.shard_index import ShardIndex
from mmssl.data.sources.catalog import Catalog, index_source, plan_source
from mmssl.data.sources.patterns import expand
from mmssl.data.storage.files import Access
from mmssl.errors import UserError
from mmssl.types import Batch

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """Shards that are read together, each sample once per epoch of the source."""

    shards: Sequence[str]
    weight: float = 1.0
    """Share of the batch relative to the other sources' weights."""


def resolve_sources(train: str | Sequence[str | SourceConfig], allow_pipe: bool = False) -> list[Source]:
    """The sources of a configuration's `data.train`: plain patterns together are one source of weight 1."""
    entries = [train] if isinstance(train, str) else list(train)
    plain = [entry for entry in entries if isinstance(entry, str)]
    weighted = [entry for entry in entries if isinstance(entry, SourceConfig)]
    sources = [Source(expand(plain, allow_pipe))] if plain or not weighted else []
    return sources + [Source(expand(s.shards, allow_pipe), s.weight) for s in weighted]


@dataclass
class LoaderCounters:
    """What this process has handed out since it started."""

    samples: int = 0
    bytes: int = 0
    """Encoded bytes read."""
    retries: int = 0
    """Remote reads that broke off and were taken up again."""
    bad_samples: int = 0
    """Samples replaced by a stand-in."""
    wait_seconds: float = 0.0
    """Time the training loop waited for a batch."""
    source_samples: tuple[int, ...] = ()
    """Samples of each source: the realised mixture."""


class TrainLoader:
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
        world_size: int = 1,
        workers: int = 0,
        worker_kind: Literal["thread", "process"] = "thread",
        limits: SampleLimits | None = None,
        access: Access | None = None,
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
        if batch_size % world_size:
            raise UserError(f"data.batch_size={batch_size} is not divisible by {world_size} processes; use a multiple")
        self._sources = list(sources)
        self._limits = limits or SampleLimits()
        self._access = access or Access()
        self._render = render
        self._seed = seed
        self._block = shuffle_block
        self._batch_size = batch_size
        self._share = (batch_size * rank // world_size, batch_size * (rank + 1) // world_size)
        self._joiner = PartJoiner(tokenize, pin_memory)
        self._workers = workers
        self._worker_kind = worker_kind
        self._ahead = batches_ahead
        self._stall_seconds = stall_seconds
        indexes = [index_source(s.shards, self._limits, self._access, index_progress) for s in sources]
        say = _log.warning if rank == 0 else _log.debug
        self._catalog, self._planned = self._index(indexes, slice_mib, say)
        if self._catalog is None:
            lanes = unindexed_lanes([s.shards for s in sources], batch_size, world_size, lanes)
        self._maker = self._make(lanes or default_lanes(batch_size))
        self._position = Position()
        self._bad_budget = BadSampleBudget(max_bad_fraction, bad_log)
        self._counters = LoaderCounters(source_samples=(0,) * len(sources))
        self._pipeline: Pipeline | None = None

    @property
    def samples(self) -> int:
        """Usable samples of all sources."""
        return self._maker.plan.samples

    @property
    def batches_per_epoch(self) -> int:
        """Global batches of an epoch."""
        return self._maker.plan.batches_per_epoch(self._batch_size)

    @property
    def samples_per_epoch(self) -> int:
        """Samples that an epoch hands out over all processes."""
        return self.batches_per_epoch * self._batch_size

    def counters(self) -> LoaderCounters:
        """What has been handed out so far."""
        return self._counters

    def state_dict(self) -> dict[str, int | str]:
        """The position after the last batch handed out: valid for any world size and workers."""
        return self._maker.plan.state(self._position)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on at a state's next sample. Its lanes are taken over; they must divide the batch.

        Raises:
            UserError: the state belongs to other data or another seed.
        """
        self.close()
        lanes = state.get("lanes")
        if self._catalog is not None and isinstance(lanes, int) and lanes > 0:
            self._maker = self._make(lanes)
        self._position = self._maker.plan.position(state)

    def skip(self, batches: int) -> None:
        """Move on by so many global batches without reading them."""
        self.close()
        plan = self._maker.plan
        for _ in range(batches):
            self._position = plan.after(plan.start(self._position, self._batch_size), self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        begin = time.monotonic()
        try:
            if self._pipeline is None:
                self._pipeline = self._start()
            made = self._pipeline.next()
            self._position = made.after
            self._bad_budget.count(made)
        except BaseException:
            self.close()
            raise
        counters = self._counters
        counters.samples += len(made.batch)
        counters.bytes += made.bytes
        counters.retries += made.retries
        counters.bad_samples += len(made.bad)
        counters.source_samples = tuple(map(sum, zip(counters.source_samples, made.sources, strict=True)))
        counters.wait_seconds += time.monotonic() - begin
        return made.batch

    def __enter__(self) -> "TrainLoader":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the workers. Iterating again goes on after the last batch handed out."""
        if self._pipeline is not None:
            self._pipeline.close()
            self._pipeline = None

    def _index(
        self, indexes: Sequence[Sequence[ShardIndex | None]], slice_mib: float | None, say: Callable[..., None]
    ) -> tuple[Catalog | None, list[PlannedSource]]:
        """What is indexed and how it is planned, if all is; says what is lost."""
        known = [[index for index in source if index is not None] for source in indexes]
        found = describe_problems([index for source in known for index in source])
        if found is not None:
            say("%s", found)
        missing = [
            shard
            for source, found in zip(self._sources, indexes, strict=True)
            for shard, index in zip(source.shards, found, strict=True)
            if index is None
        ]
        if missing:
            say(NOT_PROMISED, len(missing), missing[0])
            return None, []
        pairs = zip(self._sources, known, strict=True)
        planned = [plan_source(found, source.weight, slice_mib) for source, found in pairs]
        return Catalog(known, self._access.retry_policy), planned

    def _make(self, lanes: int) -> PartBuilder | UnindexedBuilder:
        maker: PartBuilder | UnindexedBuilder
        if self._catalog is None:
            shards, weights = [s.shards for s in self._sources], [s.weight for s in self._sources]
            passes = UnindexedPlan(shards, self._seed, lanes)
            maker = UnindexedBuilder(passes, shards, weights, self._render, self._limits, self._access)
        else:
            plan = StreamPlan(self._planned, seed=self._seed, lanes=lanes, block=self._block)
            maker = PartBuilder(plan, self._catalog, self._render, self._limits, self._access)
        maker.plan.check(self._batch_size)
        return maker

    def _start(self) -> Pipeline:
        maker = self._maker
        self._position = maker.plan.resume(self._position)
        depth = self._batch_size // maker.plan.lanes
        lanes = (self._share[1] - self._share[0]) // depth
        most = self._workers if self._catalog is not None else min(self._workers, lanes)
        cuts = split_tasks(*self._share, depth, max(1, most))
        workers: Workers
        if self._workers == 0:
            workers = InlineWorkers(maker, self._batch_size, cuts)
        elif self._worker_kind == "thread":
            workers = ThreadWorkers(maker, self._batch_size, cuts)
        else:
            workers = ProcessWorkers(maker, self._batch_size, cuts, self._position, self._ahead)
        return Pipeline(
            workers,
            self._joiner,
            maker.plan,
            self._batch_size,
            self._position,
            ahead=self._ahead if self._workers > 0 else 0,
            shards=maker.shards,
            stall_seconds=self._stall_seconds,
        )
