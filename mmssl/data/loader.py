"""The training stream: rank-local batches in the plan's order, prepared ahead by threads or processes."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mmssl import system
from mmssl.config import HoldOutConfig, SourceConfig
from mmssl.data.loading import (
    NO_INDEX_WARNING,
    BadSampleBudget,
    PartBuilder,
    PartJoiner,
    PartTask,
    Pipeline,
    Render,
    Tokenize,
    UnindexedBuilder,
    UnindexedPlan,
    split_tasks,
    unindexed_lanes,
)
from mmssl.data.loading.pipeline import Reader
from mmssl.data.loading.workers import InlineWorkers, ProcessWorkers, ThreadWorkers, Workers
from mmssl.data.order import Batching, PlannedSource, Position, StreamPlan, default_lanes
from mmssl.data.shards import Progress, SampleLimits, ShardIndex, describe_problems, is_remote
from mmssl.data.sources import expand, hold_out, index_source, set_apart
from mmssl.data.sources.catalog import Catalog, plan_source
from mmssl.data.storage import Access
from mmssl.errors import UserError
from mmssl.types import Batch

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """Shards that are read together: each sample once per epoch of the source."""

    shards: Sequence[str]
    weight: float = 1.0
    """Fraction of the batch, relative to the weights of the other sources."""


def resolve_sources(train: str | Sequence[str | SourceConfig], allow_pipe: bool = False) -> list[Source]:
    """The sources of `data.train`: all plain patterns together are one source of weight 1."""
    entries = [train] if isinstance(train, str) else list(train)
    plain = [entry for entry in entries if isinstance(entry, str)]
    weighted = [entry for entry in entries if isinstance(entry, SourceConfig)]
    sources = [Source(_training_shards(plain, allow_pipe))] if plain or not weighted else []
    return sources + [Source(_training_shards(s.shards, allow_pipe), s.weight) for s in weighted]


def _training_shards(spec: str | Sequence[str], allow_pipe: bool) -> list[str]:
    """The shards of patterns, without those of another split, which are logged."""
    names, apart = set_apart(expand(spec, allow_pipe), [spec] if isinstance(spec, str) else spec)
    if apart and system.rank() == 0:
        _log.warning(
            "%d shards beside train-*.tar are of another split and not trained on: %s%s; to train on them, name them "
            "in data.train",
            len(apart),
            apart[0],
            "" if len(apart) == 1 else " ...",
        )
    return names


def _check_on_disk(sources: Sequence[Source], setting: str, why: str) -> None:
    """Raises UserError for shards that are remote or the output of a command."""
    remote = [shard for source in sources for shard in source.shards if is_remote(shard)]
    if remote:
        raise UserError(
            f"{setting} reads {why}, so the shards must be on a disk; copy them there, or leave "
            f"{setting} out: {remote[0]}"
        )


ChooseBatching = Callable[[PlannedSource, Sequence[ShardIndex]], Batching]
"""Chooses the samples that share a batch, from a source and the indexes of its shards."""


@dataclass
class LoaderCounters:
    """Totals of this process since it started."""

    samples: int = 0
    bytes: int = 0
    """Bytes of encoded samples read."""
    retries: int = 0
    """Remote reads that broke off and were resumed."""
    bad_samples: int = 0
    """Bad samples that were replaced."""
    wait_seconds: float = 0.0
    """Time the training loop waited for a batch."""
    source_samples: tuple[int, ...] = ()
    """Samples of each source: the realised mixture."""


@dataclass(frozen=True)
class LoaderConfig:
    """Options of a training loader."""

    seed: int
    batch_size: int
    """Samples per global batch."""
    rank: int = 0
    world_size: int = 1
    lanes: int | None = None
    """Lanes of the order; None: the largest divisor of the batch up to 64."""
    shuffle_block: int = 8
    """Shuffling units per block."""
    slice_mib: float | None = None
    """MiB per slice; None: by the size of the source."""
    workers: int = 0
    """Threads or processes of this rank; 0: none."""
    worker_kind: Literal["thread", "process"] = "thread"
    batching: ChooseBatching | None = None
    """Chooses the samples that share a batch; None: chance does."""
    hold_out: HoldOutConfig = field(default_factory=HoldOutConfig)
    """Samples that are not trained on."""
    limits: SampleLimits = field(default_factory=SampleLimits)
    access: Access = field(default_factory=Access)
    max_bad_fraction: float = 0.01
    """Fraction of bad samples above which the stream stops."""
    bad_log: Path | None = None
    """JSON Lines file that lists the bad samples."""
    batches_ahead: int = 2
    stall_seconds: float = 60.0
    """Waiting time after which the log lists the reads of the workers."""
    pin_memory: bool = False


class TrainLoader:
    """Endless rank-local batches, epoch after epoch.

    The order depends only on the shards, the seed and the shape of the plan (lanes, block, slices). The global batches
    are the same for any world size and any number and kind of workers.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        config: LoaderConfig,
        render: Render,
        tokenize: Tokenize,
        index_progress: Progress | None = None,
        extras: Sequence[Reader] = (),
    ) -> None:
        """Index the sources and plan their order. Workers start with the first batch.

        Args:
            extras: called with the captions and keys of a batch for its further inputs; each with the template of the
                captions that it reads, one of the renderer's, or None for those of training.

        Raises:
            UserError: a shard cannot be read, no sample is usable, or the batch does not fit the data or the
                world size.
        """
        batch_size, world_size = config.batch_size, config.world_size
        if batch_size % world_size:
            raise UserError(f"data.batch_size={batch_size} is not divisible by {world_size} processes; use a multiple")
        if config.batching is not None:
            _check_on_disk(sources, "data.batching", "single samples in random order")
        if config.hold_out.share > 0:
            _check_on_disk(sources, "data.hold_out", "the keys of all samples")
        self._sources = list(sources)
        self._config = config
        self._render = render
        self._joiner = PartJoiner(tokenize, config.pin_memory, extras)
        start, stop = (batch_size * rank // world_size for rank in (config.rank, config.rank + 1))
        self._task = PartTask(batch_size, start, stop)
        indexes = [index_source(s.shards, config.limits, config.access, index_progress) for s in sources]
        self._catalog, self._planned = self._index(indexes, _log.warning if config.rank == 0 else _log.debug)
        lanes = config.lanes
        if self._catalog is None:
            lanes = unindexed_lanes([s.shards for s in sources], batch_size, world_size, lanes)
        self._builder = self._build(lanes or self._default_lanes())
        self._position = Position()
        self._bad_budget = BadSampleBudget(config.max_bad_fraction, config.bad_log)
        self._counters = LoaderCounters(source_samples=(0,) * len(sources))
        self._pipeline: Pipeline | None = None

    @property
    def samples(self) -> int:
        """Number of usable samples of all sources."""
        return self._builder.plan.samples

    @property
    def batches_per_epoch(self) -> int:
        """Global batches per epoch."""
        return self._builder.plan.batches_per_epoch(self._config.batch_size)

    @property
    def samples_per_epoch(self) -> int:
        """Samples per epoch over all ranks."""
        return self.batches_per_epoch * self._config.batch_size

    def counters(self) -> LoaderCounters:
        """Totals so far."""
        return self._counters

    def state_dict(self) -> dict[str, int | str]:
        """The position after the last batch. Valid for any world size and any workers."""
        return self._builder.plan.state(self._position)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at the next sample of a state, with its number of lanes, which must divide the batch.

        Raises:
            UserError: the state belongs to other data or another seed.
        """
        self.close()
        lanes = state.get("lanes")
        if self._catalog is not None and isinstance(lanes, int) and lanes > 0:
            self._builder = self._build(lanes)
        self._position = self._builder.plan.position(state)

    def place(self) -> Position:
        """The position after the last batch, for `return_to`."""
        return self._position

    def return_to(self, place: Position) -> None:
        """Drop the batches after a place, without waiting for reads that are under way."""
        self.abandon()
        self._position = place

    def skip(self, batches: int) -> None:
        """Skip global batches without reading them."""
        self.close()
        plan = self._builder.plan
        for _ in range(batches):
            self._position = plan.after(plan.start(self._position, self._config.batch_size), self._config.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        begin = time.monotonic()
        try:
            if self._pipeline is None:
                self._pipeline = self._start()
            loaded = self._pipeline.next()
            self._position = loaded.after
            self._bad_budget.count(loaded)
        except KeyboardInterrupt:
            self.abandon()
            raise
        except BaseException:
            self.close()
            raise
        counters = self._counters
        counters.samples += len(loaded.batch)
        counters.bytes += loaded.bytes
        counters.retries += loaded.retries
        counters.bad_samples += len(loaded.bad)
        counters.source_samples = tuple(map(sum, zip(counters.source_samples, loaded.sources, strict=True)))
        counters.wait_seconds += time.monotonic() - begin
        return loaded.batch

    def __enter__(self) -> "TrainLoader":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            self.abandon()
        else:
            self.close()

    def close(self) -> None:
        """Stop the workers. Iterating again continues after the last batch."""
        if self._pipeline is not None:
            self._pipeline.close()
            self._pipeline = None

    def abandon(self) -> None:
        """As `close`, but reads that stall are not waited for; they end by themselves."""
        if self._pipeline is not None:
            self._pipeline.abandon()
            self._pipeline = None

    def _index(
        self, indexes: Sequence[Sequence[ShardIndex | None]], log: Callable[..., None]
    ) -> tuple[Catalog | None, list[PlannedSource]]:
        """The catalog and the planned sources; None and no sources if a shard has no index. Logs problems."""
        known = [[index for index in source if index is not None] for source in indexes]
        problems = describe_problems([index for source in known for index in source])
        if problems is not None:
            log("%s", problems)
        missing = [
            shard
            for source, found in zip(self._sources, indexes, strict=True)
            for shard, index in zip(source.shards, found, strict=True)
            if index is None
        ]
        if missing:
            log(NO_INDEX_WARNING, len(missing), missing[0])
            if self._config.access.resized is not None:
                log("data.cache.resize is not used: without an index, images are rendered from the originals")
            return None, []
        if self._config.hold_out.share > 0:
            known = [hold_out(source, self._config.hold_out)[0] for source in known]
        pairs = zip(self._sources, known, strict=True)
        planned = [plan_source(found, source.weight, self._config.slice_mib) for source, found in pairs]
        choose = self._config.batching
        if choose is not None:
            both = zip(planned, known, strict=True)
            planned = [source.with_batching(choose(source, found)) for source, found in both]
        return Catalog(known, self._config.access.retry_policy), planned

    def _default_lanes(self) -> int:
        """Lanes whose parts of a batch are whole groups of samples that stay together."""
        group = max((source.batching.group for source in self._planned if source.batching is not None), default=1)
        return default_lanes(max(1, self._config.batch_size // group))

    def _build(self, lanes: int) -> PartBuilder | UnindexedBuilder:
        config = self._config
        builder: PartBuilder | UnindexedBuilder
        if self._catalog is None:
            shards, weights = [s.shards for s in self._sources], [s.weight for s in self._sources]
            plan = UnindexedPlan(config.seed, lanes)
            builder = UnindexedBuilder(plan, shards, weights, self._render, config.limits, config.access)
        else:
            planned = StreamPlan(self._planned, seed=config.seed, lanes=lanes, block=config.shuffle_block)
            builder = PartBuilder(planned, self._catalog, self._render, config.limits, config.access)
        builder.plan.check(config.batch_size)
        return builder

    def _start(self) -> Pipeline:
        config, builder = self._config, self._builder
        self._position = builder.plan.resume(self._position)
        depth = config.batch_size // builder.plan.lanes
        count = config.workers
        if self._catalog is None:
            # Each lane of shards without an index is read by one worker.
            count = min(count, (self._task.stop - self._task.start) // depth)
        tasks = split_tasks(self._task, depth, max(1, count))
        workers: Workers
        if config.workers == 0:
            workers = InlineWorkers(builder, tasks)
        elif config.worker_kind == "thread":
            workers = ThreadWorkers(builder, tasks)
        else:
            workers = ProcessWorkers(builder, tasks, self._position, config.batches_ahead)
        ahead = config.batches_ahead if config.workers > 0 else 0
        return Pipeline(workers, self._joiner, self._position, ahead=ahead, stall_seconds=config.stall_seconds)
