"""The training loop."""

import copy
import errno
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from mmssl import build
from mmssl.config import Config
from mmssl.data.augment import finish_views
from mmssl.distributed import processes, whole
from mmssl.evaluate.tables import Metrics, write_json
from mmssl.model import Model
from mmssl.models.batch_norm import synchronize_batch_norm
from mmssl.models.lora import merged, without_adapters
from mmssl.objectives.base import Inputs
from mmssl.objectives.mixer import weight_at
from mmssl.peers import Watch, lost_peers_as_errors
from mmssl.report.card import write_card
from mmssl.rng import torch_seed
from mmssl.train import state
from mmssl.train.balance import Balance
from mmssl.train.checkpoint import load_model_state, newest_checkpoint, step_of
from mmssl.train.ema import Ema
from mmssl.train.environment import record_start
from mmssl.train.fit import fitting_micro_batch
from mmssl.train.influence import influence
from mmssl.train.judge import Judge
from mmssl.train.length import training_length
from mmssl.train.numbers import Numbers, Pending
from mmssl.train.optim import build_optimizer, lr_factor, set_lr, update
from mmssl.train.pictures import objective_pictures, write_sheet
from mmssl.train.rewind import batches_past, rewind
from mmssl.train.shard import prepare_sharding
from mmssl.train.signals import StopRequest
from mmssl.train.start import build_accelerator, check, claim, tracker_options
from mmssl.train.state import RunState, Trained
from mmssl.train.step import backward
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


class Engine:
    """One process of a run: what is built once, and the loop."""

    def __init__(self, config: Config, resume: bool = False, rewound: bool = False) -> None:
        self.config = config = build.resolved(config)
        self.accelerator = build_accelerator(config)
        self.processes = processes(even=True, ring=config.train.exchange == "ring")
        self.main = self.processes.rank == 0
        check(config, self.processes.world, resume)
        if config.train.threads is not None:
            torch.set_num_threads(config.train.threads)
        self.console = Console(stderr=True, quiet=not self.main)
        self.schedules = build.objective_options(config)
        self.run_state = RunState()
        self.balance = Balance(config.mixer.balance, self.run_state.running)
        self.judge = Judge(config, self.accelerator, self.processes, self.run_state)
        self.signals = StopRequest()
        self._build()
        self._prepare()
        if resume:
            self._resume(rewound)
        if self.main:
            claim(config, resume)
            record_start(config.run_dir, self.run_state.step, self.processes.world, self.stream.state_dict())
            self._keep_tokenizer()
        self.processes.barrier()
        self.accelerator.init_trackers("tensorboard", init_kwargs=tracker_options(self.run_state.step))

    def _build(self) -> None:
        config = self.config
        self.tokenizer = build.build_tokenizer(config, config.run_dir / "tokenizer")
        torch.manual_seed(torch_seed(config.seed, "weights"))
        encoder = build.build_encoder(config, self.tokenizer, self._say)
        if config.train.activation_checkpointing:
            encoder.vision.checkpoint_activations()
            encoder.text.checkpoint_activations()
        self.mixer = build.build_mixer(config, encoder, self.tokenizer, self.processes)
        if config.train.sync_batch_norm and self.processes.world > 1:
            synchronize_batch_norm(self.mixer, self.processes, self.accelerator.device)
        self.mixer.to(self.accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.views = build.build_views(config, self.mixer)
        self.stream = build.build_stream(config, self.mixer, self.tokenizer, config.run_dir / "bad_samples.jsonl")
        self.counted = replace(self.stream.counters())
        self.length = training_length(config.train, config.data.batch_size, self.stream.samples_per_epoch)

    def _prepare(self) -> None:
        """Give model and optimizer to Accelerate. What is sharded is kept whole on the CPU too, to be judged."""
        config, encoder = self.config, self.mixer.encoder
        self.run_state.micro_batch = self._micro_batch()
        self.judged = copy.deepcopy(encoder).cpu() if self.accelerator.distributed_type == "FSDP" else None
        if config.train.compile:
            encoder.vision.compile()
            encoder.text.compile(dynamic=True)
        prepare_sharding(self.accelerator, self.mixer)
        self.optimizer = build_optimizer(self.mixer.named_parameters(), config.optim)
        self.model, self.prepared_optimizer = self.accelerator.prepare(self.mixer, self.optimizer)
        self.ema = Ema(encoder, config.train.ema) if config.train.ema is not None else None
        scaler = self.accelerator.scaler
        self.trained = Trained(self.mixer, self.optimizer, self.ema, self.stream, scaler, self.run_state)

    def _micro_batch(self) -> int | None:
        """As configured, or as many samples as fit."""
        config = self.config
        if config.train.micro_batch != "auto":
            return config.train.micro_batch
        rows = config.data.batch_size // self.processes.world
        weights = {name: options.weight for name, options in self.schedules.items() if options.weight > 0}
        tokens = config.model.text.max_tokens
        found, why = fitting_micro_batch(self.mixer, rows, list(self.views), tokens, weights, self.accelerator)
        self._say(f"train.micro_batch=auto: {why}")
        return found

    def _resume(self, rewound: bool) -> None:
        """Go back to the newest checkpoint that is whole; a run without one starts anew."""
        run, folder = self.config.run_dir, self.config.run_dir / "checkpoints"
        if rewound and self.main:
            self._say(rewind(run))
        self.processes.barrier()
        found = newest_checkpoint(folder)
        if found is None:
            self._say(f"no checkpoint in {folder}: starting from the beginning")
            return
        path, passed = found
        for line in [*(f"passed over: {line}" for line in passed), *state.restore(path, self.trained)]:
            self._say(line)
        if self.config.train.micro_batch != "auto":
            self.run_state.micro_batch = self.config.train.micro_batch
        self.stream.skip(batches_past(run, step_of(path)))

    def _keep_tokenizer(self) -> None:
        """Write the tokenizer into the run: whole, or not at all if this is killed."""
        folder = self.config.run_dir / "tokenizer"
        if not folder.is_dir():
            partial = folder.with_name(".writing-tokenizer")
            self.tokenizer.save(partial)
            partial.rename(folder)

    def _say(self, line: str) -> None:
        self.console.print(line, soft_wrap=True, highlight=False)

    def run(self) -> Finished:
        """Train to the end, or to a signal."""
        remedy = f"go on with: mmssl train --resume {self.config.run_dir}"
        with lost_peers_as_errors(self.processes, remedy), _full_disk_as_error(self.config.run_dir, remedy):
            with ExitStack() as stack:
                stack.enter_context(Watch(self.processes, remedy))
                logs = {name: stack.enter_context(log) for name, log in self._open_logs().items()}
                bar = stack.enter_context(ProgressBar(self.console, shown=self.main))
                self.numbers = Numbers(
                    self.config, self.accelerator, self.processes, self.run_state, self.length, logs, bar, self.balance
                )
                stack.enter_context(self.stream)
                stack.enter_context(self.signals)
                self._loop()
                results = self._finish() if self._done() else {}
            # Takes the process group down: nobody watches any more.
            self.accelerator.end_training()
        return Finished(self.config.run_dir, results, None if self._done() else self.signals.signal)

    def _finish(self) -> dict[str, Metrics]:
        """Judge the trained model and write it."""
        run, model = self.config.run_dir, self._model()
        results = self.judge.evaluate(model, run)
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
        batch = finish_views(batch.to(self.accelerator.device), self.views)
        progress = self.length.progress(step, self.run_state.seconds)
        factor = lr_factor(config.optim, progress, step, self.length.steps)
        set_lr(self.optimizer, factor)
        weights = {name: weight_at(options, step, progress) for name, options in self.schedules.items()}
        factors = self.balance.factors(weights)
        weights = {name: weight * factors[name] for name, weight in weights.items() if weight > 0}
        self.model.train()
        figures: dict[str, float] = {}
        tally = backward(
            self.model,
            self.mixer,
            batch,
            weights,
            progress,
            (config.seed, "step", step),
            self.run_state.micro_batch,
            self.accelerator,
            lambda inputs: figures.update(self._look(inputs, list(weights))),
        )
        for name, value in figures.items():
            tally.add(name, torch.tensor(value, device=self.accelerator.device), 1.0)
        norm = update(self.accelerator, self.mixer, self.optimizer, self.prepared_optimizer, config.optim.clip_norm)
        if self.ema is not None:
            self.ema.update(self.mixer.encoder, step, torch.isfinite(norm))
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

    def _look(self, inputs: Inputs, active: list[str]) -> dict[str, float]:
        """Now and then: write the objectives' pictures, and measure what each does to the towers."""
        settings, step = self.config.mixer, self.run_state.step
        if self.accelerator.distributed_type == "FSDP":  # gathers every weight, which costs more than it tells
            return {}
        if self.main and settings.picture_steps is not None and step % settings.picture_steps == 0 and step > 0:
            for name, pictures in objective_pictures(self.mixer, inputs, active, self.accelerator).items():
                write_sheet(self.config.run_dir / "pictures" / f"{name}-{step:09d}.png", pictures)
        if settings.watch_steps is None or step % settings.watch_steps:
            return {}
        return influence(self.mixer, inputs, active, self.accelerator)

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

    def _model(self) -> Model:
        """The model to judge and export: averaged weights if there are any, adapters merged; all processes call it."""
        encoder = self.mixer.encoder
        weights = self.ema.weights if self.ema is not None else encoder.state_dict()
        if self.ema is not None or self.judged is not None:
            judged = copy.deepcopy(encoder if self.judged is None else self.judged)
            load_model_state(judged.state_dict(), {n: whole(tensor) for n, tensor in weights.items()}, "the model")
            encoder = judged.to(self.accelerator.device).eval()
        return Model(merged(encoder), self.tokenizer, without_adapters(self.config.model))

    def _save(self) -> None:
        state.save(self.config.run_dir / "checkpoints", self.trained, self.config.train.keep)


def train(config: Config, resume: bool = False, rewound: bool = False) -> Finished:
    """Run a configuration to its end, on this process or on all that were launched with it.

    Args:
        resume: go on with the run in `config.run_dir`.
        rewound: with `resume`, go back to before the data at which the run stopped, and on past it.

    Raises:
        UserError: bad input; nothing was trained, or the run can be resumed.
    """
    return Engine(config, resume, rewound).run()


@contextmanager
def _full_disk_as_error(run_dir: Path, remedy: str) -> Iterator[None]:
    """One line for the user where anything in the run's folder could not be written for want of space."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UserError(f"the disk of {run_dir} is full ({error.strerror}); free some space, then {remedy}") from error


def _timed(stream: Iterable[Batch]) -> Iterator[tuple[Batch, float]]:
    """Batches with the seconds spent waiting for each."""
    iterator = iter(stream)
    while True:
        start = time.monotonic()
        batch = next(iterator)
        yield batch, time.monotonic() - start
