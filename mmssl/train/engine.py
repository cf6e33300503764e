"""The training loop."""

import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from mmssl import build
from mmssl.config import Config
from mmssl.distributed import processes
from mmssl.evaluate.tables import Metrics, write_json
from mmssl.model import MMSSL
from mmssl.models.batch_norm import synchronize_batch_norm
from mmssl.objectives.mixer import weight_at
from mmssl.rng import torch_seed
from mmssl.train import state
from mmssl.train.ema import Ema
from mmssl.train.judge import Judge
from mmssl.train.length import training_length
from mmssl.train.numbers import Numbers, Pending
from mmssl.train.optim import build_optimizer, lr_factor, set_lr
from mmssl.train.signals import StopRequest
from mmssl.train.start import build_accelerator, check, claim
from mmssl.train.state import RunState, Trained
from mmssl.train.step import backward
from mmssl.train.trackers import ProgressBar, Record, StepLog
from mmssl.types import Batch


@dataclass(frozen=True)
class Finished:
    """How a run ended."""

    run_dir: Path
    results: dict[str, Metrics]
    """`suite/task` -> figures of the final evaluation; empty where the run was stopped."""
    signal: int | None
    """The signal that stopped the run before its end, after saving."""


class Engine:
    """One process of a run: what is built once, and the loop."""

    def __init__(self, config: Config, resume: bool = False) -> None:
        self.config = config
        self.accelerator = build_accelerator(config)
        self.processes = processes(even=True)
        self.main = self.processes.rank == 0
        check(config, self.processes.world, resume)
        if config.train.threads is not None:
            torch.set_num_threads(config.train.threads)
        self.console = Console(stderr=True, quiet=not self.main)
        self.schedules = build.objective_options(config)
        self.tokenizer = build.build_tokenizer(config, config.run_dir / "tokenizer")
        torch.manual_seed(torch_seed(config.seed, "weights"))
        encoder = build.build_encoder(config, self.tokenizer)
        if config.train.activation_checkpointing:
            encoder.vision.checkpoint_activations()
            encoder.text.checkpoint_activations()
        self.mixer = build.build_mixer(config, encoder, self.tokenizer, self.processes)
        if config.train.sync_batch_norm and self.processes.world > 1:
            synchronize_batch_norm(self.mixer, self.processes, self.accelerator.device)
        self.mixer.to(self.accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.stream = build.build_stream(config, self.mixer, self.tokenizer, config.run_dir / "bad_samples.jsonl")
        self.counted = replace(self.stream.counters())
        self.length = training_length(config.train, config.data.batch_size, self.stream.samples_per_epoch)
        self.optimizer = build_optimizer(self.mixer.named_parameters(), config.optim)
        self.ema = Ema(encoder, config.train.ema) if config.train.ema is not None else None
        self.run_state = RunState()
        self.judge = Judge(config, self.accelerator, self.processes, self.run_state)
        self.signals = StopRequest()
        self.trained = Trained(
            self.mixer, self.optimizer, self.ema, self.stream, self.accelerator.scaler, self.run_state
        )
        if resume:
            for line in state.restore(config.run_dir / "checkpoints", self.trained):
                self.console.print(line, soft_wrap=True)
        self.model, self.prepared_optimizer = self.accelerator.prepare(self.mixer, self.optimizer)
        if self.main:
            claim(config, resume)
            self.tokenizer.save(config.run_dir / "tokenizer")
        self.processes.barrier()
        self.accelerator.init_trackers("tensorboard")

    def run(self) -> Finished:
        """Train to the end, or to a signal."""
        with ExitStack() as stack:
            logs = {name: stack.enter_context(log) for name, log in self._open_logs().items()}
            bar = stack.enter_context(ProgressBar(self.console, shown=self.main))
            self.numbers = Numbers(
                self.config, self.accelerator, self.processes, self.run_state, self.length, logs, bar
            )
            stack.enter_context(self.stream)
            stack.enter_context(self.signals)
            self._loop()
        results: dict[str, Metrics] = {}
        if self._done():
            results = self.judge.evaluate(self._model(), self.config.run_dir)
            if self.main:
                self._model().save(self.config.run_dir / "model")
                write_json(self.config.run_dir / "results.json", results)
        self.accelerator.end_training()
        return Finished(self.config.run_dir, results, None if self._done() else self.signals.signal)

    def _open_logs(self) -> dict[str, StepLog]:
        names = ["metrics", "sample_ids"] if self.config.train.log_samples else ["metrics"]
        step = self.run_state.step
        return {name: StepLog(self.config.run_dir / f"{name}.jsonl", step) for name in names if self.main}

    def _loop(self) -> None:
        self.mark = self.saved = time.monotonic()
        for batch, wait in _timed(self.stream) if not self._done() else ():
            pending = self._launch(batch, wait)
            self.numbers.read()
            self.numbers.pending = pending
            self.run_state.step += 1
            if self._due():
                self.numbers.read()
                if self._every(self.config.evaluate.every) and not self._done():
                    self.judge.note_best(self.judge.evaluate(self._model(), None))
                self._save()
                self.mark = self.saved = time.monotonic()
            if self.numbers.stop or self._done():
                break

    def _done(self) -> bool:
        return self.length.progress(self.run_state.step, self.run_state.seconds) >= 1

    def _every(self, steps: int | None) -> bool:
        return steps is not None and self.run_state.step % steps == 0

    def _due(self) -> bool:
        """Whether to save (and perhaps to judge) now; the same on every process."""
        every = self._every(self.config.train.checkpoint_steps) or self._every(self.config.evaluate.every)
        return every or self._done() or self.numbers.stop or self.numbers.save

    def _launch(self, batch: Batch, wait: float) -> Pending:
        """Compute the gradient of one batch and update the weights; nothing here waits for the device."""
        config, step = self.config, self.run_state.step
        batch = batch.to(self.accelerator.device)
        progress = self.length.progress(step, self.run_state.seconds)
        factor = lr_factor(config.optim, progress, step, self.length.steps)
        set_lr(self.optimizer, factor)
        weights = {name: weight_at(options, step, progress) for name, options in self.schedules.items()}
        weights = {name: weight for name, weight in weights.items() if weight > 0}
        self.model.train()
        tally = backward(
            self.model,
            self.mixer,
            batch,
            weights,
            (config.seed, "step", step),
            config.train.micro_batch,
            self.accelerator,
        )
        norm = self._update()
        now = time.monotonic()
        seconds, self.mark = now - self.mark, now
        record: Record = {
            "lr": config.optim.lr * factor,
            "samples": (step + 1) * config.data.batch_size,
            "samples_per_s": config.data.batch_size / max(seconds, 1e-9),
            "data_wait": min(wait / max(seconds, 1e-9), 1.0),
            **self._mixture(),
        }
        minutes = config.train.checkpoint_minutes
        wishes = {
            "seconds": seconds * self.main,
            "save": float(self.main and minutes is not None and now - self.saved > 60 * minutes),
            "stop": float(self.signals.signal is not None),
            **self._stream_counts(seconds),
        }
        return self.numbers.reduce(tally, weights, norm, record, batch, wishes)

    def _stream_counts(self, seconds: float) -> dict[str, float]:
        """What the stream of this process did: its speed in this step, and counts since the process started."""
        now, before, self.counted = self.stream.counters(), self.counted, replace(self.stream.counters())
        megabytes = (now.bytes - before.bytes) / 1e6
        return {"mb_per_s": megabytes / max(seconds, 1e-9), "bad_samples": now.bad_samples, "retries": now.retries}

    def _mixture(self) -> Record:
        """The share of each source in what this process was given."""
        now = self.stream.counters()
        if len(now.source_samples) < 2:
            return {}
        return {f"source_{i}_share": n / max(now.samples, 1) for i, n in enumerate(now.source_samples)}

    def _update(self) -> Tensor:
        """Clip, step, follow with the EMA; an update that is not finite is skipped on the device. Returns the norm."""
        clip = self.config.optim.clip_norm
        norm: Tensor = self.accelerator.clip_grad_norm_(self.mixer.parameters(), float("inf") if clip is None else clip)
        finite = torch.isfinite(norm)
        if self.accelerator.scaler is None:
            # AdamW's fused kernel leaves everything as it is where this is 1, without asking the host.
            self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        self.prepared_optimizer.step()
        self.prepared_optimizer.zero_grad()
        self.mixer.encoder.clamp_temperature()
        if self.ema is not None:
            self.ema.update(self.mixer.encoder, self.run_state.step, finite)
        return norm

    def _model(self) -> MMSSL:
        return MMSSL(
            self.ema.encoder if self.ema is not None else self.mixer.encoder,
            self.tokenizer,
            self.config.model,
        )

    def _save(self) -> None:
        """Write a checkpoint; the others wait, so that none runs ahead of a failed write."""
        if self.main:
            state.save(self.config.run_dir / "checkpoints", self.trained, self.config.train.keep)
        self.processes.barrier()


def train(config: Config, resume: bool = False) -> Finished:
    """Run a configuration to its end, on this process or on all that were launched with it.

    Raises:
        UserError: bad input; nothing was trained, or the run can be resumed.
    """
    return Engine(config, resume).run()


def _timed(stream: Iterable[Batch]) -> Iterator[tuple[Batch, float]]:
    """Batches with the seconds spent waiting for each."""
    iterator = iter(stream)
    while True:
        start = time.monotonic()
        batch = next(iterator)
        yield batch, time.monotonic() - start
