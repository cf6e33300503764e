"""The training loop."""

import json
import math
import platform
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import accelerate
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from rich.console import Console
from torch import Tensor

from mmssl import build
from mmssl.config import Config, dump_config
from mmssl.data.loader import sources_of
from mmssl.distributed import processes
from mmssl.evaluate import suite
from mmssl.evaluate.datasets import open_dataset
from mmssl.evaluate.tables import Metrics, write_json
from mmssl.model import MMSSL
from mmssl.models.batch_norm import synchronize_batch_norm
from mmssl.objectives.mixer import weight_at
from mmssl.rng import torch_seed
from mmssl.train import checkpoint
from mmssl.train.ema import Ema
from mmssl.train.length import training_length
from mmssl.train.optim import build_optimizer, lr_factor, set_lr
from mmssl.train.signals import StopRequest
from mmssl.train.step import Tally, backward
from mmssl.train.trackers import ProgressBar, Record, StepLog
from mmssl.types import Batch, UserError


@dataclass(frozen=True)
class Finished:
    """How a run ended."""

    run_dir: Path
    results: dict[str, Metrics]
    """`suite/task` -> figures of the final evaluation; empty where the run was stopped."""
    signal: int | None
    """The signal that stopped the run before its end, after saving."""


@dataclass
class _Pending:
    """A step whose numbers are still on the device; they are read one step later, so that the device never waits."""

    step: int
    weights: dict[str, float]
    names: list[str]
    numbers: Tensor
    norm: Tensor
    record: Record
    keys: list[str]
    ids: Tensor | None


class Engine:
    """One process of a run: what is built once, and the loop."""

    def __init__(self, config: Config, resume: bool = False) -> None:
        self.config = config
        self.accelerator = _accelerator(config)
        self.processes = processes(even=True)
        self.main = self.processes.rank == 0
        _check(config, self.processes.world, resume)
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
        self.step, self.seconds, self.skipped, self.skipped_in_row = 0, 0.0, 0, 0
        self.best: tuple[float, int] | None = None
        self.pending: _Pending | None = None
        self.asked = {"stop": False, "save": False}
        self.signals = StopRequest()
        if resume:
            self._restore()
        self.model, self.prepared_optimizer = self.accelerator.prepare(self.mixer, self.optimizer)
        if self.main:
            _claim(config, resume)
            self.tokenizer.save(config.run_dir / "tokenizer")
        self.processes.barrier()
        self.accelerator.init_trackers("tensorboard")

    def run(self) -> Finished:
        """Train to the end, or to a signal."""
        with ExitStack() as stack:
            self.logs = {name: stack.enter_context(log) for name, log in self._open_logs().items()}
            self.bar = stack.enter_context(ProgressBar(self.console, shown=self.main))
            stack.enter_context(self.stream)
            stack.enter_context(self.signals)
            self._loop()
        results: dict[str, Metrics] = {}
        if self._done():
            results = self._evaluate(self.config.run_dir)
            if self.main:
                self._model().save(self.config.run_dir / "model")
                write_json(self.config.run_dir / "results.json", results)
        self.accelerator.end_training()
        return Finished(self.config.run_dir, results, None if self._done() else self.signals.signal)

    def _open_logs(self) -> dict[str, StepLog]:
        names = ["metrics", "sample_ids"] if self.config.train.log_samples else ["metrics"]
        return {name: StepLog(self.config.run_dir / f"{name}.jsonl", self.step) for name in names if self.main}

    def _loop(self) -> None:
        self.mark = self.saved = time.monotonic()
        for batch, wait in _timed(self.stream) if not self._done() else ():
            pending = self._launch(batch, wait)
            self._read()
            self.pending = pending
            self.step += 1
            if self._due():
                self._read()
                if self._every(self.config.evaluate.every) and not self._done():
                    self._note_best(self._evaluate(None))
                self._save()
                self.mark = self.saved = time.monotonic()
            if self.asked["stop"] or self._done():
                break

    def _done(self) -> bool:
        return self.length.progress(self.step, self.seconds) >= 1

    def _every(self, steps: int | None) -> bool:
        return steps is not None and self.step % steps == 0

    def _due(self) -> bool:
        """Whether to save (and perhaps to judge) now; the same on every process."""
        every = self._every(self.config.train.checkpoint_steps) or self._every(self.config.evaluate.every)
        return every or self._done() or self.asked["stop"] or self.asked["save"]

    def _launch(self, batch: Batch, wait: float) -> "_Pending":
        """Compute the gradient of one batch and update the weights; nothing here waits for the device."""
        config, step = self.config, self.step
        batch = batch.to(self.accelerator.device)
        progress = self.length.progress(step, self.seconds)
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
            "step": step + 1,
            "lr": config.optim.lr * factor,
            "samples": (step + 1) * config.data.batch_size,
            "samples_per_s": config.data.batch_size / max(seconds, 1e-9),
            "data_wait": min(wait / max(seconds, 1e-9), 1.0),
            **self._stream_record(seconds),
        }
        return self._reduce(tally, weights, norm, seconds, record, batch)

    def _stream_record(self, seconds: float) -> Record:
        """What the stream of this process did during the step."""
        now, before, self.counted = self.stream.counters(), self.counted, replace(self.stream.counters())
        record: Record = {
            "mb_per_s": (now.bytes - before.bytes) / 1e6 / max(seconds, 1e-9),
            "bad_samples": now.bad_samples,
        }
        if len(now.source_samples) > 1:
            record |= {f"source_{i}_share": n / max(now.samples, 1) for i, n in enumerate(now.source_samples)}
        return record

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
            self.ema.update(self.mixer.encoder, self.step, finite)
        return norm

    def _reduce(
        self,
        tally: Tally,
        weights: dict[str, float],
        norm: Tensor,
        seconds: float,
        record: Record,
        batch: Batch,
    ) -> "_Pending":
        """Start adding up the step's numbers over the processes, with what they must agree on."""
        device = norm.device
        minutes = self.config.train.checkpoint_minutes
        save = self.main and minutes is not None and time.monotonic() - self.saved > 60 * minutes
        stop = self.signals.signal is not None
        for name, value in (("seconds", seconds * self.main), ("save", float(save)), ("stop", float(stop))):
            tally.add(name, torch.tensor(value, device=device), 0.0)
        numbers = self.processes.sum(tally.stacked())
        ids = self.processes.gather(batch.ids)[0] if self.config.train.log_samples else None
        return _Pending(self.step + 1, weights, list(tally.sums), numbers, norm, record, batch.keys, ids)

    def _read(self) -> None:
        """Take in the numbers of the pending step: log them, and learn what the processes agreed on.

        Raises:
            UserError: too many updates in a row were not finite.
        """
        if self.pending is None:
            return
        step, self.pending = self.pending, None
        sums = dict(zip(step.names, step.numbers.tolist(), strict=True))
        self.seconds += sums.pop("seconds")[0]
        for flag in self.asked:
            self.asked[flag] = sums.pop(flag)[0] > 0
        values = {name: total / count if count else float("nan") for name, (total, count) in sums.items()}
        loss = sum(weight * values[f"{name}.loss"] for name, weight in step.weights.items())
        norm = float(step.norm)
        finite = math.isfinite(norm)
        self.skipped += not finite
        self.skipped_in_row = 0 if finite else self.skipped_in_row + 1
        record = {
            "step": step.record.pop("step"),
            "loss": loss,
            **step.record,
            **values,
            "gradient_norm": norm,
        }
        record |= {"seconds": round(self.seconds, 3), "skipped_updates": self.skipped}
        if self.main:
            self.logs["metrics"].write(record)
            if step.ids is not None:
                self.logs["sample_ids"].write({"step": step.step, "ids": step.ids.tolist()})
            self.accelerator.log({k: v for k, v in record.items() if isinstance(v, (int, float))}, step=step.step)
            self.bar.update(record, self.length.progress(step.step, self.seconds))
        if self.skipped_in_row >= self.config.train.nonfinite_limit:
            path = self.config.run_dir / f"nonfinite-step-{step.step}-rank-{self.processes.rank}.json"
            path.write_text(json.dumps({"step": step.step, "keys": step.keys}), encoding="utf-8")
            raise UserError(
                f"the loss or gradient was not finite at {self.skipped_in_row} steps in a row up to "
                f"{step.step}; the samples of the "
                f"last one are named in {path}; lower optim.lr or use train.precision=bf16, then --resume "
                f"from the last checkpoint"
            )

    def _model(self) -> MMSSL:
        return MMSSL(
            self.ema.encoder if self.ema is not None else self.mixer.encoder,
            self.tokenizer,
            self.config.model,
        )

    def _evaluate(self, out: Path | None) -> dict[str, Metrics]:
        """Judge the present model (its EMA if there is one) on the configured suites; every process gets the
        figures."""
        suites = self.config.evaluate.suites
        results: dict[str, Metrics] = {}
        if self.main and suites:
            model = self._model()
            datasets = {name: (entry.data, entry.task) for name, entry in suites.items()}
            results = suite.run(
                model,
                datasets,
                out,
                batch_size=self.config.evaluate.batch_size,
                logit_scale=model.logit_scale,
                draw=out is not None,
            )
            with (self.config.run_dir / "evaluations.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": self.step, "seconds": self.seconds, "results": results}) + "\n")
            figures = {
                f"eval/{n}/{k}": v for n, m in results.items() for k, v in m.items() if isinstance(v, (int, float))
            }
            self.accelerator.log(figures, step=self.step)
        results = self.processes.broadcast(results)
        return results

    def _note_best(self, results: dict[str, Metrics]) -> None:
        name = self.config.evaluate.best or next((f"{r}/{next(iter(m))}" for r, m in results.items()), None)
        if name is None:
            return
        result, _, metric = name.rpartition("/")
        if metric not in results.get(result, {}):
            known = ", ".join(f"{r}/{m}" for r, metrics in results.items() for m in metrics)
            raise UserError(f"evaluate.best={name!r} is not measured; there are: {known}")
        value = float(results[result][metric])
        if self.best is None or value > self.best[0]:
            self.best = (value, self.step)

    def _save(self) -> None:
        """Write a checkpoint; the others wait, so that none runs ahead of a failed write."""
        if self.main:
            folder = self.config.run_dir / "checkpoints"
            names: dict[Tensor, str] = {parameter: name for name, parameter in self.mixer.named_parameters()}
            tensors = dict(self.mixer.state_dict())
            if self.ema is not None:
                tensors |= {f"ema.{name}": value for name, value in self.ema.encoder.state_dict().items()}
            state = {
                "seconds": self.seconds,
                "skipped": [self.skipped, self.skipped_in_row],
                "best": self.best,
                "stream": self.stream.state_dict(),
                "scaler": None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict(),
                "versions": _versions(),
            }
            optimizer = checkpoint.optimizer_tensors(self.optimizer, names)
            checkpoint.save_checkpoint(folder, self.step, tensors, optimizer, state)
            best = None if self.best is None else folder / f"step-{self.best[1]:09d}"
            checkpoint.prune_checkpoints(folder, self.config.train.keep, best)
        self.processes.barrier()

    def _restore(self) -> None:
        """Go back to the newest checkpoint that is whole; a run without one starts anew."""
        found = checkpoint.newest_checkpoint(self.config.run_dir / "checkpoints")
        if found is None:
            return
        path, passed = found
        for line in passed:
            self.console.print(f"passed over: {line}", style="yellow")
        tensors, optimizer, state = checkpoint.load_checkpoint(path)
        ema = {name.removeprefix("ema."): tensors.pop(name) for name in list(tensors) if name.startswith("ema.")}
        checkpoint.load_model_state(self.mixer, tensors, f"checkpoint {path}")
        if self.ema is not None:
            checkpoint.load_model_state(self.ema.encoder, ema, f"checkpoint {path} (EMA)")
        checkpoint.load_optimizer_tensors(self.optimizer, dict(self.mixer.named_parameters()), optimizer)
        self.stream.load_state_dict(state["stream"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.skipped, self.skipped_in_row = state["skipped"]
        self.best = None if state["best"] is None else (state["best"][0], state["best"][1])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.console.print(f"resumed from {path} at step {self.step}")


def train(config: Config, resume: bool = False) -> Finished:
    """Run a configuration to its end, on this process or on all that were launched with it.

    Raises:
        UserError: bad input; nothing was trained, or the run can be resumed.
    """
    return Engine(config, resume).run()


def _accelerator(config: Config) -> Accelerator:
    precision = config.train.precision
    if precision == "fp16" and not torch.cuda.is_available():
        raise UserError("train.precision=fp16 needs a GPU; use bf16 or fp32")
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    accelerator = Accelerator(
        mixed_precision="no" if precision == "fp32" else precision,
        kwargs_handlers=[ddp],
        log_with=list(config.train.trackers) or None,
        project_dir=str(config.run_dir),
    )
    return accelerator


def _check(config: Config, world: int, resume: bool) -> None:
    """What can be refused before anything is built.

    Raises:
        UserError: the run exists already, shards or data sets are missing, or the batch does not divide.
    """
    if config.run_dir.exists() and not resume:
        raise UserError(
            f"run_dir={config.run_dir} exists; pick another, or go on with it: mmssl train --resume {config.run_dir}"
        )
    if config.data.batch_size % world:
        raise UserError(
            f"data.batch_size={config.data.batch_size} does not divide by the {world} processes; pick a "
            f"multiple of {world}"
        )
    sources_of(config.data.train, config.data.allow_pipe)
    for name, entry in config.evaluate.suites.items():
        open_dataset(entry.data, name=name)


def _claim(config: Config, resume: bool) -> None:
    """Make the run's folder and write its configuration.

    Raises:
        UserError: it cannot be written.
    """
    run = config.run_dir
    try:
        run.mkdir(parents=True, exist_ok=resume)
        checkpoint.write_atomically(run / "config.yaml", dump_config(config).encode())
    except OSError as error:
        raise UserError(f"run_dir={run} cannot be written: {error.strerror}; pick another folder") from None


def _timed(stream: Iterable[Batch]) -> Iterator[tuple[Batch, float]]:
    """Batches with the seconds spent waiting for each."""
    iterator = iter(stream)
    while True:
        start = time.monotonic()
        batch = next(iterator)
        yield batch, time.monotonic() - start


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        **{m.__name__: m.__version__ for m in (torch, accelerate, transformers)},
    }
