"""The training loop."""

import copy
import errno
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mmssl.apps.report.card import write_card
from mmssl.config import Config
from mmssl.data.transforms import finish_views
from mmssl.distributed import Heartbeat, full_tensor, peer_loss_as_user_error
from mmssl.errors import UserError
from mmssl.evaluate.results import Metrics
from mmssl.files import write_json
from mmssl.inference.model import Model
from mmssl.models.lora import merged, without_adapters
from mmssl.objectives._base import Inputs
from mmssl.objectives._task import weight_at
from mmssl.train import state
from mmssl.train.checkpoint import load_model_state
from mmssl.train.diagnostics import objective_gradients, objective_images, write_image_grid
from mmssl.train.evaluation import RunEvaluator
from mmssl.train.loggers import ProgressBar, Record, StepLog
from mmssl.train.optim import lr_factor, set_lr, update
from mmssl.train.recovery import StopRequest
from mmssl.train.setup import Setup, set_up
from mmssl.train.step import backward
from mmssl.train.step_metrics import PendingStep, StepMetrics
from mmssl.types import Batch


@dataclass(frozen=True)
class Finished:
    """How a run ended."""

    run_dir: Path
    results: dict[str, Metrics]
    """`suite/task` -> figures of the final evaluation; empty where the run was stopped."""
    signal: int | None
    """The signal that stopped the run before its end, after saving."""


class Trainer:
    """The loop of one process of a run."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.config, self.accelerator, self.world = setup.config, setup.accelerator, setup.world
        self.main = self.world.rank == 0
        self.task, self.stream = setup.trained.task, setup.trained.stream
        self.run_state = setup.trained.run
        self.last_counts = replace(self.stream.counters())
        self.evaluator = RunEvaluator(self.config, self.accelerator, self.world, self.run_state)
        self.signals = StopRequest()

    def run(self) -> Finished:
        """Train to the end, or to a signal."""
        remedy = f"go on with: mmssl train --resume {self.config.run_dir}"
        with peer_loss_as_user_error(self.world, remedy), _exhaustion_as_user_error(self.config.run_dir, remedy):
            with ExitStack() as stack:
                stack.enter_context(Heartbeat(self.world, remedy))
                logs = {name: stack.enter_context(log) for name, log in self._open_logs().items()}
                bar = stack.enter_context(ProgressBar(self.setup.console, self.main, self._progress()))
                self.numbers = StepMetrics(
                    self.config,
                    self.accelerator,
                    self.world,
                    self.run_state,
                    self.setup.length,
                    logs,
                    bar,
                )
                stack.enter_context(self.stream)
                stack.enter_context(self.signals)
                self._loop()
                results = self._finish() if self._done() else {}
            # Takes the process group down: nobody watches any more.
            self.accelerator.end_training()
        # Another process may have been asked to stop, and this one not.
        stopped_by = None if self._done() else self.signals.signal or signal.SIGTERM
        return Finished(self.config.run_dir, results, stopped_by)

    def _finish(self) -> dict[str, Metrics]:
        """Judge the trained model and write it."""
        run, model = self.config.run_dir, self._model()
        results = self.evaluator.evaluate(model, run)
        if self.main:
            model.save(run / "model")
            write_json(run / "results.json", results)
            write_card(run)
        return results

    def _open_logs(self) -> dict[str, StepLog]:
        names = ["metrics", "sample_ids"] if self.config.train.log_samples else ["metrics"]
        step = self.run_state.step
        return {name: StepLog(self.config.run_dir / f"{name}.jsonl", step) for name in names if self.main}

    def _loop(self) -> None:
        self.last_step_at = self.last_save_at = time.monotonic()
        for batch, wait in _with_wait_time(self.stream) if not self._done() else ():
            pending = self._launch(batch, wait)
            self.numbers.read()
            self.numbers.pending = pending
            self.run_state.step += 1
            if self._due():
                self.numbers.read()
                if self._every(self.config.evaluate.every) and not self._done():
                    self.evaluator.update_best(self.evaluator.evaluate(self._model(), None))
                state.save(self.config.run_dir / "checkpoints", self.setup.trained, self.config.train.keep)
                self.numbers.save = False
                self.last_step_at = self.last_save_at = time.monotonic()
            if self.numbers.stop or self._done():
                break

    def _progress(self) -> float:
        """The part of the training that is done."""
        return self.setup.length.progress(self.run_state.step, self.run_state.seconds)

    def _done(self) -> bool:
        return self._progress() >= 1

    def _every(self, steps: int | None) -> bool:
        return steps is not None and self.run_state.step % steps == 0

    def _due(self) -> bool:
        """Whether to save (and perhaps to judge) now; the same on every process."""
        every = self._every(self.config.train.checkpoint_steps) or self._every(self.config.evaluate.every)
        return every or self._done() or self.numbers.stop or self.numbers.save

    def _launch(self, batch: Batch, wait: float) -> PendingStep:
        """Compute the gradient of one batch and update the weights; nothing here waits for the device."""
        config, setup, step, progress = self.config, self.setup, self.run_state.step, self._progress()
        batch = finish_views(batch.to(self.accelerator.device), setup.views)
        factor = lr_factor(config.optim, progress, step, setup.length.steps)
        set_lr(setup.trained.optimizer, factor)
        weights = self._weights(progress)
        setup.model.train()
        figures: dict[str, float] = {}
        tally = backward(
            setup.model,
            self.task,
            batch,
            weights,
            progress,
            (config.seed, "step", step),
            self.run_state.micro_batch,
            self.accelerator,
            lambda inputs: figures.update(self._diagnose(inputs, list(weights))),
        )
        clip = config.optim.clip_norm
        norm = update(self.accelerator, self.task, setup.trained.optimizer, setup.prepared_optimizer, clip)
        tally.add("gradient_norm", norm, 1.0)
        if setup.trained.ema is not None:
            setup.trained.ema.update(self.task.encoder, step, torch.isfinite(norm))
        now = time.monotonic()
        seconds, self.last_step_at = now - self.last_step_at, now
        record: Record = {
            "lr": config.optim.lr * factor,
            "samples": (step + 1) * config.data.batch_size,
            "samples_per_s": config.data.batch_size / max(seconds, 1e-9),
            "data_wait": min(wait / max(seconds, 1e-9), 1.0),
            **self._mixture(),
        }
        host_values = {name: (value, 1.0) for name, value in figures.items()}
        host_values |= {
            name: (value, 0.0) for name, value in {**self._requests(now), **self._stream_counts(seconds)}.items()
        }
        host_values["seconds"] = (seconds * self.main, 0.0)
        return self.numbers.reduce(tally, weights, record, batch, host_values)

    def _weights(self, progress: float) -> dict[str, float]:
        """The objectives that act at this step, with their weights."""
        step = self.run_state.step
        weights = {name: weight_at(options, step, progress) for name, options in self.setup.schedules.items()}
        return {name: weight for name, weight in weights.items() if weight > 0}

    def _requests(self, now: float) -> dict[str, float]:
        """What this process asks of all."""
        minutes = self.config.train.checkpoint_minutes
        save = self.main and minutes is not None and now - self.last_save_at > 60 * minutes
        return {"save": float(save), "stop": float(self.signals.signal is not None)}

    def _diagnose(self, inputs: Inputs, active: list[str]) -> dict[str, float]:
        """Now and then: write the objectives' images, and measure what each does to the towers."""
        settings, step = self.config.mixer, self.run_state.step
        if self.accelerator.distributed_type == "FSDP":  # gathers every weight, which costs more than it tells
            return {}
        if self.main and settings.image_steps is not None and step % settings.image_steps == 0 and step > 0:
            for name, images in objective_images(self.task, inputs, active, self.accelerator).items():
                write_image_grid(self.config.run_dir / "images" / f"{name}-{step:09d}.png", images)
        if settings.watch_steps is None or step % settings.watch_steps:
            return {}
        return objective_gradients(self.task, inputs, active, self.accelerator)

    def _stream_counts(self, seconds: float) -> dict[str, float]:
        """What the stream of this process did: its speed in this step, and counts since the process started."""
        now, before, self.last_counts = self.stream.counters(), self.last_counts, replace(self.stream.counters())
        megabytes = (now.bytes - before.bytes) / 1e6
        return {"mb_per_s": megabytes / max(seconds, 1e-9), "bad_samples": now.bad_samples, "retries": now.retries}

    def _mixture(self) -> Record:
        """The share of each source in what this process was given."""
        now = self.stream.counters()
        if len(now.source_samples) < 2:
            return {}
        return {f"source_{i}_share": n / max(now.samples, 1) for i, n in enumerate(now.source_samples)}

    def _model(self) -> Model:
        """The model to judge and export: averaged weights if there are any, adapters merged; all processes call it."""
        encoder, ema, unsharded = self.task.encoder, self.setup.trained.ema, self.setup.unsharded
        if ema is not None or unsharded is not None:
            weights = encoder.state_dict() if ema is None else ema.weights
            copied = copy.deepcopy(encoder if unsharded is None else unsharded)
            found = {name: full_tensor(tensor).to(copied.log_logit_scale.device) for name, tensor in weights.items()}
            load_model_state(copied.state_dict(), found, "the model")
            encoder = copied.to(self.accelerator.device).eval()
        return Model(merged(encoder), self.setup.tokenizer, without_adapters(self.config.model))


def train(config: Config, resume: bool = False, rewound: bool = False) -> Finished:
    """Run a configuration to its end, on this process or on all that were launched with it.

    Args:
        resume: go on with the run in `config.run_dir`.
        rewound: with `resume`, go back to before the data at which the run stopped, and on past it.

    Raises:
        UserError: bad input; nothing was trained, or the run can be resumed.
    """
    return Trainer(set_up(config, resume, rewound)).run()


@contextmanager
def _exhaustion_as_user_error(run_dir: Path, remedy: str) -> Iterator[None]:
    """One line for the user where a device's memory or the disk of the run's folder did not suffice."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the device is out of memory ({str(error).splitlines()[0]}); {remedy} train.micro_batch=auto, or give a "
            f"number of samples"
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UserError(f"the disk of {run_dir} is full ({error.strerror}); free some space, then {remedy}") from error


def _with_wait_time(stream: Iterable[Batch]) -> Iterator[tuple[Batch, float]]:
    """Batches with the seconds spent waiting for each."""
    iterator = iter(stream)
    while True:
        start = time.monotonic()
        batch = next(iterator)
        yield batch, time.monotonic() - start
