"""Run state and how it is saved to and restored from checkpoints."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmssl.data import TrainLoader
from mmssl.distributed import FolderLock, full_tensor
from mmssl.errors import UserError
from mmssl.objectives import TrainingTask
from mmssl.train import checkpoint
from mmssl.train.optim import Ema
from mmssl.train.provenance import versions

Record = dict[str, Any]
"""What a log says of one step: numbers, words, and lists of numbers."""


@dataclass
class Watch:
    """Findings of the evaluations so far on the metric that picks the best step, and on the guard's."""

    metric: str | None = None
    """`SUITE/TASK/METRIC`, once it was measured."""
    last: tuple[float, int] | None = None
    """Its value at the last evaluation, and the step."""
    reference: float | None = None
    """The value that the next evaluation has to improve on."""
    stale: int = 0
    """Evaluations since the reference was reached."""
    guard: tuple[str, float, float] | None = None
    """The guard's metric, and its value at the first and the last evaluation."""
    rate: float = 1.0
    """Factor of the learning rate, as the guard lowered it."""
    counted: int = -1
    """The last step whose evaluation was taken into account."""

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Watch":
        """The watch of a checkpoint's record; entries of other versions are left out."""
        known: dict[str, Any] = {name: value for name, value in record.items() if name in cls.__dataclass_fields__}
        tuples = {name: tuple(value) for name, value in known.items() if isinstance(value, list)}
        return cls(**(known | tuples))


@dataclass
class RunState:
    """Counters of a run that a checkpoint keeps."""

    step: int = 0
    """Updates done, skipped ones included."""
    seconds: float = 0.0
    """Seconds spent in training steps, on process 0."""
    skipped: int = 0
    """Updates skipped because the gradient was not finite."""
    skipped_in_row: int = 0
    """Updates skipped since the last one that was not."""
    best: tuple[float, int] | None = None
    """Best value so far of the metric that picks the best checkpoint, and its step."""
    watch: Watch = field(default_factory=Watch)
    alarms: list[str] = field(default_factory=list)
    """Kinds of alarms already logged."""
    micro_batch: int | None = None
    """Samples whose activations are held at a time, as configured or as measured; None: all."""
    evaluation_due: bool = False
    """The step was saved before its evaluation, which has not finished."""
    records: dict[str, Record] = field(default_factory=dict)
    """Name of a log -> its record of the last step, which replaces a line that a power failure cut."""


@dataclass(frozen=True)
class Trained:
    """The live objects whose state a checkpoint holds."""

    task: TrainingTask
    optimizer: torch.optim.Optimizer
    ema: Ema | None
    stream: TrainLoader
    scaler: torch.amp.GradScaler | None
    run: RunState


def save(folder: Path, trained: Trained, lock: FolderLock) -> None:
    """Write a checkpoint into `folder`, of which this process still holds the lock.

    Every process calls it. Process 0 writes; the others provide their shards and wait, so that none continues after
    a failed write.

    Raises:
        UserError: the checkpoint cannot be written; earlier ones are untouched.
    """
    task, run = trained.task, trained.run
    main = task.world.rank == 0
    names: dict[Tensor, str] = {parameter: name for name, parameter in task.named_parameters()}
    tensors = _gathered(task.state_dict(), main)
    if trained.ema is not None:
        tensors |= _gathered({f"ema.{name}": value for name, value in trained.ema.weights.items()}, main)
    optimizer = _gathered(checkpoint.optimizer_tensors(trained.optimizer, names), main)
    if main:
        lock.check()
        state = {
            "seconds": run.seconds,
            "skipped": [run.skipped, run.skipped_in_row],
            "best": run.best,
            "watch": asdict(run.watch),
            "alarms": run.alarms,
            "micro_batch": run.micro_batch,
            "evaluation_due": run.evaluation_due,
            "records": run.records,
            "stream": trained.stream.state_dict(),
            "scaler": None if trained.scaler is None else trained.scaler.state_dict(),
            "versions": versions(),
        }
        checkpoint.save_checkpoint(folder, run.step, tensors, optimizer, state)
    task.world.barrier()


def note_evaluation(folder: Path, run: RunState) -> None:
    """Add the outcome of its evaluation to the checkpoint just written. One process calls it.

    Raises:
        UserError: the checkpoint cannot be written; it stays as it was.
    """
    outcome = {"best": run.best, "watch": asdict(run.watch), "evaluation_due": run.evaluation_due}
    checkpoint.update_state(folder, run.step, outcome)


def prune(folder: Path, run: RunState, keep: int) -> None:
    """Delete checkpoints beyond the newest `keep`, except the best one. One process calls it."""
    best = None if run.best is None else checkpoint.path_of(folder, run.best[1])
    checkpoint.prune_checkpoints(folder, run.step, keep, best)


def restore(path: Path, trained: Trained) -> list[str]:
    """Restore a checkpoint.

    Returns: lines for the user.

    Raises:
        UserError: it is damaged, or has another architecture than the configuration.
    """
    tensors, optimizer, state = checkpoint.load_checkpoint(path)
    lacking = sorted(checkpoint.KINDS.keys() - state.keys())
    if lacking:
        raise UserError(
            f"checkpoint {path} is damaged: state.json: {lacking[0]} is missing; remove it to use the one before"
        )
    differing = _differing_versions(state["versions"])
    where = f"checkpoint {path}" + (f" ({differing})" if differing else "")
    ema = {name.removeprefix("ema."): tensors.pop(name) for name in list(tensors) if name.startswith("ema.")}
    checkpoint.load_model_state(trained.task.state_dict(), tensors, where)
    if trained.ema is not None:
        if not ema:
            raise UserError(f"{where} has no EMA weights; resume with train.ema=null")
        checkpoint.load_model_state(trained.ema.weights, ema, f"{where}, EMA")
    checkpoint.load_optimizer_tensors(trained.optimizer, dict(trained.task.named_parameters()), optimizer)
    trained.stream.load_state_dict(state["stream"])
    run = trained.run
    run.step, run.seconds = state["step"], state["seconds"]
    run.skipped, run.skipped_in_row = state["skipped"]
    run.best = None if state["best"] is None else (state["best"][0], state["best"][1])
    run.watch = Watch.of(state.get("watch", {}))
    run.alarms.extend(state["alarms"])
    run.micro_batch = state["micro_batch"]
    run.evaluation_due = state.get("evaluation_due", False)
    run.records = state.get("records", {})
    if trained.scaler is not None and state["scaler"] is not None:
        trained.scaler.load_state_dict(state["scaler"])
    lines = [f"{where}: the resumed run may differ by rounding"] if differing else []
    return [*lines, f"resumed from {path} at step {run.step}"]


def _gathered(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Full tensors on the CPU, one at a time, as one device may not hold all of a sharded model. Empty without `keep`:
    processes that do not write only provide their shards."""
    found = ((name, full_tensor(tensor)) for name, tensor in tensors.items())
    return {name: tensor.cpu() for name, tensor in found if keep}


def _differing_versions(then: Mapping[str, Any]) -> str:
    now = versions()
    changes = [f"{name} {old}, now {now.get(name)}" for name, old in then.items() if now.get(name) != old]
    return f"written with {'; '.join(changes)}" if changes else ""
