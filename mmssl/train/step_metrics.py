"""A step's numbers: added up over the processes on the device, and read one step late, so that it never waits."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor

from mmssl.config import Config
from mmssl.distributed import World
from mmssl.errors import UserError
from mmssl.train.diagnostics import Alarms
from mmssl.train.loggers import ProgressBar, Record, StepLog
from mmssl.train.optim import Length
from mmssl.train.recovery import BadStep, write_bad_steps
from mmssl.train.state import RunState
from mmssl.train.step import Tally
from mmssl.types import Batch

STREAM = ("mb_per_s", "bad_samples", "retries")
"""What the streams of all processes did together: encoded megabytes a second, samples that a stand-in replaced and
remote reads taken up again since the processes started."""
SCALE_STEPS = 16
"""Under fp16 so many more updates in a row may be skipped: the gradient's scale starts at 2 ** 16, and each overflow
halves it."""


class AsyncCopy:
    """A tensor on its way to the host: the copy begins at once, and waiting for it waits for nothing launched later."""

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


@dataclass
class PendingStep:
    """A step whose numbers are still on the device."""

    step: int
    weights: Mapping[str, float]
    names: list[str]
    numbers: AsyncCopy
    """Sum and count of each name, over all processes."""
    record: Record
    keys: list[str]
    ids: AsyncCopy | None


@dataclass
class StepMetrics:
    """Adds up, reads and logs the numbers of steps."""

    config: Config
    accelerator: Accelerator
    world: World
    run: RunState
    length: Length
    logs: Mapping[str, StepLog]
    bar: ProgressBar
    stop: bool = False
    """The processes agreed to save and stop."""
    save: bool = False
    """The processes agreed to save."""
    pending: PendingStep | None = None
    limit: int = field(init=False)
    """Updates in a row that may be skipped."""
    alarms: Alarms = field(init=False)
    bad: list[BadStep] = field(default_factory=list)
    """The steps in a row up to now whose gradient was not finite, as far as this process saw them."""

    def __post_init__(self) -> None:
        self.limit = self.config.train.nonfinite_limit + (0 if self.accelerator.scaler is None else SCALE_STEPS)
        self.alarms = Alarms(self.config.data.batch_size, self.config.model.max_logit_scale, self.run.alarms)

    def reduce(
        self,
        tally: Tally,
        weights: Mapping[str, float],
        record: Record,
        batch: Batch,
        told: Mapping[str, tuple[float, float]],
    ) -> PendingStep:
        """Start adding up a step's numbers over the processes, with what they must agree on.

        Args:
            tally: with `gradient_norm`.
            told: sums and counts that this process's host knows: `seconds`, `save` and `stop`, of which any process's
                wish counts, what its stream did (`STREAM`), and figures of its own.
        """
        device = batch.tokens.device
        host = torch.tensor(list(told.values()))
        host = host.pin_memory() if device.type == "cuda" else host
        numbers = self.world.sum(torch.cat([tally.stacked(), host.to(device, non_blocking=True)]))
        ids = AsyncCopy(self.world.gather(batch.ids)[0]) if self.config.train.log_samples else None
        names = [*tally.sums, *told]
        return PendingStep(self.run.step + 1, weights, names, AsyncCopy(numbers), record, batch.keys, ids)

    def read(self) -> None:
        """Take in the pending step's numbers: log them, and learn what the processes agreed on.

        Raises:
            UserError: too many updates in a row were not finite.
        """
        if self.pending is None:
            return
        step, self.pending = self.pending, None
        run = self.run
        sums = dict(zip(step.names, step.numbers.wait().tolist(), strict=True))
        run.seconds += sums.pop("seconds")[0]
        self.stop, self.save = sums.pop("stop")[0] > 0, sums.pop("save")[0] > 0
        stream = {name: sums.pop(name)[0] for name in STREAM}
        values = {name: total / count if count else math.nan for name, (total, count) in sums.items()}
        finite = math.isfinite(values["gradient_norm"])
        run.skipped += not finite
        run.skipped_in_row = 0 if finite else run.skipped_in_row + 1
        self.bad = [] if finite else [*self.bad, BadStep(step.step, step.keys)]
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
            "seconds": round(run.seconds, 3),
            "skipped_updates": run.skipped,
        }
        if self.world.rank == 0:
            self._log(step, record)
        if run.skipped_in_row >= self.limit:
            self._give_up()

    def _log(self, step: PendingStep, record: Record) -> None:
        progress = self.length.progress(step.step, self.run.seconds)
        alarms = self.alarms.look(record, progress)
        for alarm in alarms:
            self.bar.say(f"warning: {alarm}")
        self.logs["metrics"].write({**record, "alarm": "; ".join(alarms)} if alarms else record)
        if step.ids is not None:
            self.logs["sample_ids"].write({"step": step.step, "ids": step.ids.wait().tolist()})
        self.accelerator.log({k: v for k, v in record.items() if isinstance(v, (int, float))}, step=step.step)
        self.bar.update(record, progress)

    def _give_up(self) -> None:
        path = write_bad_steps(self.config.run_dir, self.world.rank, self.bad)
        raise UserError(
            f"the loss or gradient was not finite at {self.run.skipped_in_row} steps in a row up to "
            f"{self.bad[-1].step}; their samples are named in {path}; leave them out with --resume RUN --rewind, or "
            f"lower optim.lr or use train.precision=bf16 and --resume from the last checkpoint"
        )
