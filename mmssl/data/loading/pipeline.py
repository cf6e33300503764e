"""Batches prepared ahead of the training loop: parts from workers, joined in order and tokenized; bad samples."""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from mmssl.data import transforms
from mmssl.data.loading.parts import BAD_IN_A_ROW
from mmssl.data.loading.workers import Wait, Workers
from mmssl.data.order import Position
from mmssl.data.shards import BadSample
from mmssl.errors import UserError
from mmssl.files import append_json_lines
from mmssl.types import Batch

Tokenize = Callable[[list[str]], tuple[Tensor, Tensor]]
"""Captions -> token ids int64 [B, L] and mask bool [B, L]."""
Extras = Callable[[list[str], list[str]], dict[str, Tensor]]
"""Captions and keys (`shard:key`) of B samples -> further inputs by name, B rows each."""
Reader = tuple[str | None, Extras]
"""Template of the captions that a maker of further inputs reads, None for those of training; and the maker."""
_FIRST = 1_000
"""Samples after which the fraction of bad ones is checked."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedBatch:
    """A batch and its loading statistics."""

    batch: Batch
    after: Position
    """Position of the stream after the batch."""
    bad: list[tuple[int, BadSample]]
    """Row in the batch and the bad sample that was replaced there."""
    bytes: int
    retries: int
    sources: tuple[int, ...]
    """Samples of each source."""


class PartJoiner:
    """Joins parts to a batch."""

    def __init__(self, tokenize: Tokenize, pin_memory: bool, extras: Sequence[Reader] = ()) -> None:
        self._tokenize = tokenize
        self._extras = extras
        self._pin_memory = pin_memory

    def join(self, parts: Wait, after: Position) -> LoadedBatch:
        """Wait for the parts, then join them in order."""
        found = parts()
        texts, keys = [text for part in found for text in part.texts], [key for part in found for key in part.keys]
        tokens, mask = self._tokenize(texts)
        extras: dict[str, Tensor] = {}
        for template, read in self._extras:
            own = texts if template is None else [text for part in found for text in part.readings[template]]
            extras |= read(own, keys)
        batch = Batch(
            views={name: self._cat([part.views[name] for part in found]) for name in found[0].views},
            tokens=self._pinned(tokens),
            token_mask=self._pinned(mask),
            ids=torch.tensor([number for part in found for number in part.ids]),
            keys=keys,
            augment_params={
                name: torch.cat([part.augment_params[name] for part in found]) for name in found[0].augment_params
            },
            groups={name: torch.cat([part.groups[name] for part in found]) for name in found[0].groups},
            more_tokens=self._more_tokens([part.more_texts for part in found]),
            extras={name: self._pinned(rows) for name, rows in extras.items()},
        )
        first, bad = 0, []
        for part in found:
            bad += [(first + slot, sample) for slot, sample in part.bad]
            first += len(part.keys)
        sources = tuple(map(sum, zip(*(part.sources for part in found), strict=True)))
        return LoadedBatch(
            batch,
            after,
            bad,
            bytes=sum(part.bytes for part in found),
            retries=sum(part.retries for part in found),
            sources=sources,
        )

    def _more_tokens(self, parts: Sequence[list[list[str]]]) -> dict[str, Tensor]:
        """`tokens.1` and `token_mask.1` of the second captions, and so on."""
        found: dict[str, Tensor] = {}
        for number, texts in enumerate(zip(*parts, strict=True), start=1):
            tokens, mask = self._tokenize([text for part in texts for text in part])
            pair = {f"tokens.{number}": tokens, f"token_mask.{number}": mask}
            found |= {name: self._pinned(rows) for name, rows in pair.items()}
        return found

    def _pinned(self, rows: Tensor) -> Tensor:
        return rows.pin_memory() if self._pin_memory else rows

    def _cat(self, views: Sequence[Tensor]) -> Tensor:
        if len(views) == 1 and not self._pin_memory:
            return views[0]
        count, side = sum(len(view) for view in views), views[0].shape[-1]
        if not self._pin_memory:
            return torch.cat(list(views), out=transforms.views.empty_images(count, side))
        return torch.cat(list(views), out=torch.empty(count, 3, side, side, dtype=torch.uint8, pin_memory=True))


class Pipeline:
    """Keeps up to `ahead` batches in preparation beside the requested one; none with `ahead` 0."""

    def __init__(
        self, workers: Workers, joiner: PartJoiner, first: Position, *, ahead: int, stall_seconds: float
    ) -> None:
        self._workers = workers
        self._joiner = joiner
        self._position = first
        self._ahead = ahead
        self._stall_seconds = stall_seconds
        self._pending: deque[Future[LoadedBatch]] = deque()
        # One thread: batches are joined in order.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="mmssl-join") if ahead > 0 else None

    def next(self) -> LoadedBatch:
        """The next batch. Errors of the workers are raised here."""
        if self._pool is None:
            return self._joiner.join(*self._request())
        while len(self._pending) <= self._ahead:
            self._pending.append(self._pool.submit(self._joiner.join, *self._request()))
        future = self._pending.popleft()
        waited = 0.0
        while not wait([future], timeout=self._stall_seconds).done:
            waited += self._stall_seconds
            _log.warning("no batch for %.0f s: %s", waited, self._describe_stall())
        return future.result()

    def close(self) -> None:
        """Drop pending batches and join every thread and process."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        self._workers.close()
        if self._pool is not None:
            self._pool.shutdown(wait=True)

    def abandon(self) -> None:
        """Drop pending batches; threads that wait for a read end when it does."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        self._workers.abandon()

    def _request(self) -> tuple[Wait, Position]:
        plan, batch_size = self._workers.builder.plan, self._workers.tasks[0].batch_size
        start = plan.start(self._position, batch_size)
        self._position = plan.after(start, batch_size)
        return self._workers.request(start), self._position

    def _describe_stall(self) -> str:
        """The read that each worker waits for."""
        now, shards = time.monotonic_ns(), self._workers.builder.shards
        reads = [
            f"worker {worker} reads {shards[shard]} at byte {byte} since {(now - since) / 1e9:.0f} s"
            for worker, (shard, byte, since) in enumerate(self._workers.reading.tolist())
            if since > 0
        ]
        return "; ".join(reads) or "every worker is decoding or waiting"


class BadSampleBudget:
    """Logs bad samples and stops the stream when there are too many."""

    def __init__(self, max_fraction: float, log: Path | None) -> None:
        self._max_fraction = max_fraction
        self._log = log
        self._samples = 0
        self._bad = 0
        self._in_a_row = 0
        self._last: BadSample | None = None

    def count(self, loaded: LoadedBatch) -> None:
        """Count the bad samples of a batch.

        Raises:
            UserError: more than the fraction of all samples so far, or 100 in a row, were bad.
        """
        self._write(loaded)
        self._samples += len(loaded.batch)
        self._bad += len(loaded.bad)
        previous = -1
        for row, bad in loaded.bad:
            self._last = bad
            self._in_a_row = self._in_a_row + 1 if row == previous + 1 else 1
            previous = row
            if self._in_a_row >= BAD_IN_A_ROW:
                raise UserError(f"{BAD_IN_A_ROW} samples in a row could not be used, the last one {self._name(bad)}")
        if previous != len(loaded.batch) - 1:
            self._in_a_row = 0
        if self._samples >= _FIRST and self._bad > self._max_fraction * self._samples:
            assert self._last is not None
            raise UserError(
                f"{self._bad} of {self._samples} samples could not be used, more than data.bad_samples="
                f"{self._max_fraction}; the last one {self._name(self._last)}; to go on, raise that fraction or leave "
                "such samples out: mmssl shards pack SHARDS --out FOLDER"
            )

    def _name(self, bad: BadSample) -> str:
        where = "" if self._log is None else f"; all are in {self._log}"
        return f"is {bad.key!r} of {bad.shard} ({bad.error}){where}; run `mmssl shards check` on these shards"

    def _write(self, loaded: LoadedBatch) -> None:
        if self._log is None or not loaded.bad:
            return
        try:
            append_json_lines(self._log, (asdict(bad) for _, bad in loaded.bad))
        except OSError as error:
            _log.warning(
                "%s cannot be written (%s): bad samples are counted, but not listed", self._log, error.strerror
            )
            self._log = None
