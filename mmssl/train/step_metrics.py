"""Metrics of a step: added up over the processes on the device, and read one step late so that nothing waits."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mmssl.distributed import World
from mmssl.train.loggers import RunLogger
from mmssl.train.recovery import NonFiniteGuard
from mmssl.train.state import Record, RunState
from mmssl.train.step import Tally
from mmssl.types import Batch

STREAM = ("mb_per_s", "bad_samples", "retries")
"""Sums over the loaders of all processes: encoded megabytes per second, and since the processes started, samples
replaced by a stand-in and remote reads that were retried."""


class AsyncCopy:
    """An asynchronous copy of a tensor to the host. Waiting for it waits for nothing launched later."""

    def __init__(self, tensor: Tensor) -> None:
        self._copy = tensor.to("cpu", non_blocking=True)
        self._copied = torch.cuda.Event() if tensor.is_cuda else None  # type: ignore[no-untyped-call]
        if self._copied is not None:
            self._copied.record()

    def wait(self) -> Tensor:
        """The tensor on the host."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._copy


@dataclass(frozen=True)
class PendingStep:
    """A step whose metrics are still on the device."""

    step: int
    weights: Mapping[str, float]
    names: list[str]
    sums: AsyncCopy
    """Sum and count of each name, over all processes."""
    record: Record
    keys: list[str]
    ids: AsyncCopy | None


class StepMetrics:
    """Adds up the metrics of steps over the processes, and reads them one step late.

    Attributes:
        stop: the processes agreed to save and stop.
        save: the processes agreed to save.
    """

    def __init__(self, world: World, run: RunState, logger: RunLogger, guard: NonFiniteGuard, log_ids: bool) -> None:
        """`log_ids`: gather the sample ids of every global batch."""
        self._world, self._run, self._logger, self._guard, self._log_ids = world, run, logger, guard, log_ids
        self._pending: PendingStep | None = None
        self.stop = False
        self.save = False

    def reduce(
        self,
        tally: Tally,
        weights: Mapping[str, float],
        record: Record,
        batch: Batch,
        host_values: Mapping[str, tuple[float, float]],
    ) -> PendingStep:
        """Start to add up a step's metrics over the processes. Waits for nothing.

        Args:
            tally: with `gradient_norm`.
            host_values: (sum, count) pairs known on the CPU: `seconds`, `save` and `stop` (a request of any process
                counts), loader counters (`STREAM`), and further metrics.
        """
        device = batch.tokens.device
        host = torch.tensor(list(host_values.values()))
        host = host.pin_memory() if device.type == "cuda" else host
        sums = self._world.sum(torch.cat([tally.stacked(), host.to(device, non_blocking=True)]))
        ids = AsyncCopy(self._world.gather(batch.ids)[0]) if self._log_ids else None
        names = [*tally.sums, *host_values]
        return PendingStep(self._run.step + 1, weights, names, AsyncCopy(sums), record, batch.keys, ids)

    def read(self, next_step: PendingStep | None = None) -> None:
        """Read and log the pending step, with the requests of all processes. From then on `next_step` is pending.

        Raises:
            UserError: too many updates in a row were not finite.
        """
        step, self._pending = self._pending, next_step
        if step is None:
            return
        sums = dict(zip(step.names, step.sums.wait().tolist(), strict=True))
        self._run.seconds += sums.pop("seconds")[0]
        self.stop, self.save = sums.pop("stop")[0] > 0, sums.pop("save")[0] > 0
        stream = {name: sums.pop(name)[0] for name in STREAM}
        values = {name: total / count if count else math.nan for name, (total, count) in sums.items()}
        self._guard.count(step.step, step.keys, math.isfinite(values["gradient_norm"]))
        # A loss without a term, as of masked words where no caption had any, adds nothing to the total.
        losses = {name: values[f"{name}.loss"] for name in step.weights if sums[f"{name}.loss"][1]}
        record: Record = {
            "step": step.step,
            "loss": sum(step.weights[name] * loss for name, loss in losses.items()),
            **step.record,
            "mb_per_s": stream["mb_per_s"],
            "bad_samples": round(stream["bad_samples"]),
            "retries": round(stream["retries"]),
            **values,
            "seconds": round(self._run.seconds, 3),
            "skipped_updates": self._run.skipped,
        }
        ids = step.ids
        self._logger.log(step.step, record, None if ids is None else lambda: ids.wait().tolist())
        self._guard.check()
