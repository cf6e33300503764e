"""The training loop."""

import copy
import errno
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from mmssl.build import resolve
from mmssl.config import Config
from mmssl.data.transforms import finish_views
from mmssl.distributed import Heartbeat, full_tensor, peer_loss_as_user_error
from mmssl.errors import StopRequested, UserError
from mmssl.evaluate import Metrics
from mmssl.files import write_json
from mmssl.inference import Model
from mmssl.models import lora, tower_check
from mmssl.objectives import base, mixing
from mmssl.precision import Precision, emulation_warning
from mmssl.train import state
from mmssl.train.checkpoint import load_encoder, load_model_state, path_of, verify_checkpoint
from mmssl.train.diagnostics import objective_gradients, objective_images, write_image_grid
from mmssl.train.evaluation import RunEvaluator
from mmssl.train.held_out import HeldOut
from mmssl.train.loggers import RunLogger
from mmssl.train.optim import lr_factor, set_lr, update
from mmssl.train.recovery import NonFiniteGuard, StopRequest
from mmssl.train.setup import Setup, resume_command, set_up
from mmssl.train.state import Record
from mmssl.train.step import Step, Tally, backward
from mmssl.train.step_metrics import PendingStep, StepMetrics
from mmssl.types import Batch


@dataclass(frozen=True)
class Finished:
    """The end of a run."""

    run_dir: Path
    results: dict[str, Metrics]
    """`suite/task` -> metrics of the final evaluation; empty if the run was stopped."""
    signal: int | None
    """The signal that stopped the run early, after saving."""


class Trainer:
    """The training loop of one process."""

    def __init__(
        self,
        setup: Setup,
        *,
        clock: Callable[[], float] = time.monotonic,
        stop_request: StopRequest | None = None,
        backward: Callable[..., Tally] = backward,
    ) -> None:
        """Take over what `set_up` built.

        Args:
            clock: seconds, for speeds and for saving by time.
            stop_request: asks the run to save and stop. Default: the signals to stop.
            backward: computes the gradient of a step.
        """
        self.setup = setup
        self.config, self.accelerator, self.world = setup.plan.config, setup.accelerator, setup.world
        assert self.config.train.precision != "auto", "set_up resolves it"
        self.precision: Precision = self.config.train.precision
        self.main = self.world.rank == 0
        self.task, self.stream = setup.trained.task, setup.trained.stream
        self.run_state = setup.trained.run
        self.clock = clock
        self.stop_request = stop_request or StopRequest()
        self.backward = backward
        self.last_counts = replace(self.stream.counters())
        self.last_step_at = self.last_save_at = clock()
        self.checkpoints = self.config.run_dir / "checkpoints"
        self.saved_step = self.run_state.step
        self.held_out = HeldOut(setup.plan, self.run_state, self._say)
        self.evaluator = RunEvaluator(
            setup.plan, self.accelerator, self.world, self.run_state, self.held_out, self._say
        )
        self.logger = RunLogger(
            self.config,
            self.run_state,
            setup.length,
            setup.console,
            self.accelerator.log,
            self.main,
            emulation_warning(self.precision, self.accelerator.device.type),
        )
        scaled = self.accelerator.scaler is not None
        guard = NonFiniteGuard(self.config, self.run_state, self.world.rank, scaled)
        self.metrics = StepMetrics(self.world, self.run_state, self.logger, guard, self.config.train.log_samples)

    def run(self) -> Finished:
        """Train to the end, or until a signal."""
        remedy = f"go on with: {resume_command(self.config.run_dir)}"
        results = None
        with peer_loss_as_user_error(self.world, remedy), _exhaustion_as_user_error(self.config.run_dir, remedy):
            beat = Heartbeat(self.world, remedy, self._left_behind)
            with self.stop_request, ExitStack() as stack, beat, self.logger, self.stream:
                stack.callback(self.setup.lock.release)
                self._loop()
                if not self._done():
                    self.stream.abandon()  # reads that stall would be waited for
                results = self._finish() if self._done() else None
            # Destroys the process group, so only after the heartbeat has ended.
            self.accelerator.end_training()
        # Another process may have received the signal.
        stopped_by = None if results is not None else self.stop_request.signal or signal.SIGTERM
        return Finished(self.config.run_dir, results or {}, stopped_by)

    def _finish(self) -> dict[str, Metrics] | None:
        """Evaluate the trained model and write it; None if a signal ended the evaluation."""
        run = self.config.run_dir
        try:
            with self._waiting():
                model, results, step = self._final_model(run)
        except StopRequested:
            return None
        if self.main:
            model.save(run / "model")
            write_json(run / "results.json", results)
            if (record := self.held_out.record(step)) is not None:
                write_json(run / "best.json", record)
        return results

    def _final_model(self, run: Path) -> tuple[Model, dict[str, Metrics], int]:
        """The model to export, its metrics, and its step: the last one or the best one."""
        results, ended = dict[str, Metrics](), self.held_out.ended
        if not ended:  # else the last step was evaluated
            model = self._model()
            results = self.evaluator.evaluate(model, run)
            if self.main and self.setup.plan.suites:
                state.note_evaluation(self.checkpoints, self.run_state)
        weights = self._best_weights()
        step = self.run_state.step if weights is None else self.held_out.wanted_step
        if ended or weights is not None:
            model = self._model(weights)
            results, _ = self.evaluator.measure(model, run, step)
        return model, results, step

    def _best_weights(self) -> dict[str, Tensor] | None:
        """The weights to export if they are not those of the last step, on every process alike."""
        if self.held_out.wanted_step == self.run_state.step:
            if self.held_out.fallen:
                self._say("warning: guard: the model is below the floor; no better step was evaluated")
            return None
        path = path_of(self.checkpoints, self.held_out.wanted_step)
        problem = None
        if self.main:
            try:
                verify_checkpoint(path)
            except UserError as error:
                problem = str(error)
        problem = self.world.broadcast(problem)
        if problem is not None:
            self._say(f"error: {problem}; the model is that of the last step")
            return None
        self._say(self.held_out.described())
        return load_encoder(path)

    def _loop(self) -> None:
        if self.run_state.evaluation_due:
            self._evaluate()
        elif self.held_out.lacks_start:
            self._save()
        self.last_step_at = self.last_save_at = self.clock()
        checked = False
        for batch, wait in self._timed_batches() if not self._done() else ():
            if not checked:
                self._check_embeddings(batch)
                checked = True
            self.metrics.read(next_step=self._launch(batch, wait))
            self.run_state.step += 1
            if self._save_due():
                self._save()
            if self.metrics.stop or self._done():
                return
        if self.run_state.step > self.saved_step:
            self._save()  # a signal ended the wait for a batch

    def _save(self) -> None:
        """Write a checkpoint, then evaluate if it is time to: an evaluation that ends badly costs no step."""
        self.metrics.read()
        self.run_state.evaluation_due = self._every(self.config.evaluate.every) and not self._done()
        self.logger.sync()
        state.save(self.checkpoints, self.setup.trained, self.setup.lock)
        self.saved_step = self.run_state.step
        self.metrics.save = False
        if self.run_state.evaluation_due and not self.metrics.stop:
            self._evaluate()
        if self.main:
            state.prune(self.checkpoints, self.run_state, self.config.train.keep)
        self.last_step_at = self.last_save_at = self.clock()

    def _evaluate(self) -> None:
        """Evaluate the checkpoint just written. A signal leaves that to the resumed run."""
        try:
            with self._waiting():
                self.evaluator.evaluate(self._model(), None)
        except StopRequested:
            self.metrics.stop = True
            return
        self.run_state.evaluation_due = False
        if self.main:
            state.note_evaluation(self.checkpoints, self.run_state)

    def _timed_batches(self) -> Iterator[tuple[Batch, float]]:
        """Batches with the seconds spent waiting for each, until a signal ends a wait."""
        iterator = iter(self.stream)
        while True:
            start, place = self.clock(), self.stream.place()
            try:
                with self._waiting():
                    batch = next(iterator)
            except StopRequested:
                self.stream.return_to(place)
                return
            yield batch, self.clock() - start

    def _check_embeddings(self, batch: Batch) -> None:
        """Stop a run whose captions or images all have one embedding; called with its first batch."""
        # Sharded weights cannot be read outside of a step.
        encoder = self.setup.unsharded or self.task.encoder
        first = batch.slice(0, min(len(batch), 4 * tower_check.SAMPLES)).to(encoder.log_logit_scale.device)
        tower_check.check_embeddings(encoder, first.views.get("main"), first.tokens, first.token_mask)

    def _waiting(self) -> AbstractContextManager[None]:
        """A wait that a signal ends; not with several processes, where the others would wait for this one."""
        return self.stop_request.waiting(raises=self.world.size == 1)

    def _left_behind(self) -> int | None:
        """The exit status if this process, one of several, waits too long to save after a signal. Else None."""
        number = self.stop_request.signal
        return 128 + number if number is not None and self.stop_request.stalled else None

    def _say(self, line: str) -> None:
        """Print a line for the user, on process 0."""
        self.setup.console.print(line, soft_wrap=True, highlight=False, markup=False)

    def _fraction(self) -> float:
        """Fraction of the training that is done."""
        return self.setup.length.fraction(self.run_state.step, self.run_state.seconds)

    def _done(self) -> bool:
        """True if there is no step left: the length is reached, or evaluations ended the run."""
        return self._fraction() >= 1 or self.held_out.ended

    def _every(self, steps: int | None) -> bool:
        return steps is not None and self.run_state.step % steps == 0

    def _save_due(self) -> bool:
        """True if it is time to save, and perhaps to evaluate; the same on every process."""
        every = self._every(self.config.train.checkpoint_steps) or self._every(self.config.evaluate.every)
        return every or self._done() or self.metrics.stop or self.metrics.save

    def _launch(self, batch: Batch, wait: float) -> PendingStep:
        """Compute the gradient of one batch and update the weights; nothing here waits for the device."""
        config, setup, number, fraction = self.config, self.setup, self.run_state.step, self._fraction()
        batch = finish_views(batch.to(self.accelerator.device), setup.views)
        factor = lr_factor(config.optim, fraction, number, setup.length.steps) * self.run_state.watch.rate
        set_lr(setup.trained.optimizer, factor)
        weights = self._weights(fraction)
        step = Step(self.task, batch, weights, fraction, (config.seed, "step", number), self.run_state.micro_batch)
        setup.model.train()
        diagnostics: dict[str, float] = {}
        tally = self.backward(
            setup.model,
            step,
            self.accelerator,
            lambda inputs: diagnostics.update(self._diagnose(inputs, list(weights))),
        )
        clip = config.optim.clip_norm
        norm = update(self.accelerator, self.task, setup.trained.optimizer, setup.prepared_optimizer, clip)
        tally.add("gradient_norm", norm, 1.0)
        if setup.trained.ema is not None:
            setup.trained.ema.update(self.task.encoder, number, torch.isfinite(norm))
        now = self.clock()
        seconds, self.last_step_at = now - self.last_step_at, now
        record: Record = {
            "lr": config.optim.lr * factor,
            "samples": (number + 1) * config.data.batch_size,
            "samples_per_s": config.data.batch_size / max(seconds, 1e-9),
            "data_wait": min(wait / max(seconds, 1e-9), 1.0),
            **self._mixture(),
        }
        sums = {**self._requests(now), **self._stream_counts(seconds), "seconds": seconds * self.main}
        host_values = {name: (value, 1.0) for name, value in diagnostics.items()}
        host_values |= {name: (value, 0.0) for name, value in sums.items()}
        return self.metrics.reduce(tally, weights, record, batch, host_values)

    def _weights(self, fraction: float) -> dict[str, float]:
        """The objectives that are active at this step, with their weights."""
        step = self.run_state.step
        weights = {
            name: mixing.weight_at(options, step, fraction) for name, options in self.setup.plan.objectives.items()
        }
        return {name: weight for name, weight in weights.items() if weight > 0}

    def _requests(self, now: float) -> dict[str, float]:
        """Save and stop requests of this process, to be added up over all processes."""
        minutes = self.config.train.checkpoint_minutes
        save = self.main and minutes is not None and now - self.last_save_at > 60 * minutes
        return {"save": float(save), "stop": float(self.stop_request.requested)}

    def _diagnose(self, inputs: base.Inputs, active: list[str]) -> dict[str, float]:
        """Every few steps: write the objectives' images, and measure each objective's gradient on the towers."""
        settings, step = self.config.mixer, self.run_state.step
        if self.accelerator.distributed_type == "FSDP":  # would gather every weight
            return {}
        if self.main and settings.image_steps is not None and step % settings.image_steps == 0 and step > 0:
            for name, images in objective_images(self.task, inputs, active, self.accelerator).items():
                write_image_grid(self.config.run_dir / "images" / f"{name}-{step:09d}.png", images)
        if settings.watch_steps is None or step % settings.watch_steps:
            return {}
        return objective_gradients(self.task, inputs, active, self.accelerator)

    def _stream_counts(self, seconds: float) -> dict[str, float]:
        """This process's loader: its speed in this step, and counts since the process started."""
        now, before, self.last_counts = self.stream.counters(), self.last_counts, replace(self.stream.counters())
        megabytes = (now.bytes - before.bytes) / 1e6
        return {"mb_per_s": megabytes / max(seconds, 1e-9), "bad_samples": now.bad_samples, "retries": now.retries}

    def _mixture(self) -> Record:
        """Share of each source in this process's samples."""
        now = self.stream.counters()
        if len(now.source_samples) < 2:
            return {}
        return {f"source_{i}_share": n / max(now.samples, 1) for i, n in enumerate(now.source_samples)}

    def _model(self, weights: Mapping[str, Tensor] | None = None) -> Model:
        """The model to evaluate and export, adapters merged. All processes call it.

        Args:
            weights: those of a checkpoint. Default: the current ones, or their moving average.
        """
        encoder, ema, unsharded = self.task.encoder, self.setup.trained.ema, self.setup.unsharded
        if weights is not None or ema is not None or unsharded is not None:
            if weights is None:
                weights = encoder.state_dict() if ema is None else ema.weights
            copied = copy.deepcopy(encoder if unsharded is None else unsharded)
            found = {name: full_tensor(tensor).to(copied.log_logit_scale.device) for name, tensor in weights.items()}
            load_model_state(copied.state_dict(), found, "the model")
            encoder = copied.to(self.accelerator.device).eval()
        settings = lora.without_adapters(self.config.model)
        return Model(lora.merged(encoder), self.setup.tokenizer, settings, precision=self.precision)


def train(config: Config, resume: bool = False, rewind: bool = False) -> Finished:
    """Run a configuration to its end, on this process or on all that were launched with it.

    Args:
        resume: go on with the run in `config.run_dir`.
        rewind: with `resume`, restart from the last checkpoint before the bad batches and skip them.

    Raises:
        UserError: bad input, where nothing was trained, or a stop after which the run can be resumed.
    """
    return Trainer(set_up(resolve(config), resume, rewind)).run()


@contextmanager
def _exhaustion_as_user_error(run_dir: Path, remedy: str) -> Iterator[None]:
    """Turn a full device memory or a full disk into one line for the user."""
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
