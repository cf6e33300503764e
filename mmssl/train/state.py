"""What a run knows of itself, and how checkpoints keep and restore it."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mmssl.data.loader import TrainStream
from mmssl.objectives.mixer import Mixer
from mmssl.train import checkpoint
from mmssl.train.ema import Ema
from mmssl.train.start import versions


@dataclass
class RunState:
    """The numbers of a run that go on after it is resumed."""

    step: int = 0
    """Updates done, skipped ones included."""
    seconds: float = 0.0
    """Time spent in training steps, of process 0."""
    skipped: int = 0
    """Updates skipped because the gradient was not finite."""
    skipped_in_row: int = 0
    """Of those, the ones since the last update that was not skipped."""
    best: tuple[float, int] | None = None
    """The best figure so far of the metric that picks the best checkpoint, and its step."""


@dataclass(frozen=True)
class Trained:
    """The live objects whose state a checkpoint holds."""

    mixer: Mixer
    optimizer: torch.optim.Optimizer
    ema: Ema | None
    stream: TrainStream
    scaler: torch.amp.GradScaler | None
    run: RunState


def save(folder: Path, trained: Trained, keep: int) -> None:
    """Write a checkpoint into `folder` and delete those beyond `keep`, but not the best one.

    Raises:
        UserError: it cannot be written; earlier ones are untouched.
    """
    mixer, run = trained.mixer, trained.run
    names: dict[Tensor, str] = {parameter: name for name, parameter in mixer.named_parameters()}
    tensors = dict(mixer.state_dict())
    if trained.ema is not None:
        tensors |= {f"ema.{name}": value for name, value in trained.ema.encoder.state_dict().items()}
    state = {
        "seconds": run.seconds,
        "skipped": [run.skipped, run.skipped_in_row],
        "best": run.best,
        "stream": trained.stream.state_dict(),
        "scaler": None if trained.scaler is None else trained.scaler.state_dict(),
        "versions": versions(),
    }
    optimizer = checkpoint.optimizer_tensors(trained.optimizer, names)
    checkpoint.save_checkpoint(folder, run.step, tensors, optimizer, state)
    best = None if run.best is None else folder / f"step-{run.best[1]:09d}"
    checkpoint.prune_checkpoints(folder, keep, best)


def restore(folder: Path, trained: Trained) -> list[str]:
    """Go back to the newest checkpoint that is whole, and say which; a run without one starts anew.

    Returns: lines for the user.

    Raises:
        UserError: there are only damaged ones, or the newest holds another architecture.
    """
    found = checkpoint.newest_checkpoint(folder)
    if found is None:
        return [f"no checkpoint in {folder}: starting from the beginning"]
    path, passed = found
    tensors, optimizer, state = checkpoint.load_checkpoint(path)
    ema = {name.removeprefix("ema."): tensors.pop(name) for name in list(tensors) if name.startswith("ema.")}
    checkpoint.load_model_state(trained.mixer, tensors, f"checkpoint {path}")
    if trained.ema is not None:
        checkpoint.load_model_state(trained.ema.encoder, ema, f"checkpoint {path} (EMA)")
    checkpoint.load_optimizer_tensors(trained.optimizer, dict(trained.mixer.named_parameters()), optimizer)
    trained.stream.load_state_dict(state["stream"])
    run = trained.run
    run.step, run.seconds = state["step"], state["seconds"]
    run.skipped, run.skipped_in_row = state["skipped"]
    run.best = None if state["best"] is None else (state["best"][0], state["best"][1])
    if trained.scaler is not None and state["scaler"] is not None:
        trained.scaler.load_state_dict(state["scaler"])
    return [*(f"passed over: {line}" for line in passed), f"resumed from {path} at step {run.step}"]
