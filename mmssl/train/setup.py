"""What a run is made of: the objects that one process trains with, built once.

How a run starts: what can be refused before anything is built, Accelerate's object, and the run's folder.
"""

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from rich.console import Console
from torch import nn

from mmssl import build
from mmssl.config import Config, ViewConfig, dump_config
from mmssl.data import resolve_sources
from mmssl.data.transforms import Tokenizer
from mmssl.distributed import World, current_world
from mmssl.errors import UserError
from mmssl.evaluate.datasets import open_dataset
from mmssl.files import atomic_write
from mmssl.models.batch_norm import synchronize_batch_norm
from mmssl.models.dual_encoder import DualEncoder
from mmssl.objectives._base import ObjectiveOptions
from mmssl.objectives._task import TrainingTask, first_gap
from mmssl.rng import torch_seed
from mmssl.train import state
from mmssl.train.checkpoint import newest_checkpoint, step_of
from mmssl.train.memory import fit_micro_batch
from mmssl.train.optim import Ema, Length, build_optimizer, training_length
from mmssl.train.parallel import configure_ddp, prepare_sharding
from mmssl.train.provenance import record_start
from mmssl.train.recovery import batches_past, rewind
from mmssl.train.state import RunState, Trained


@dataclass(frozen=True)
class Setup:
    """One process of a run, ready to train."""

    config: Config
    """With everything written out that follows from it."""
    accelerator: Accelerator
    world: World
    console: Console
    """Silent but on process 0."""
    tokenizer: Tokenizer
    schedules: dict[str, ObjectiveOptions]
    views: dict[str, ViewConfig]
    length: Length
    trained: Trained
    """The objects whose state a checkpoint holds."""
    model: nn.Module
    """The mixer as Accelerate prepared it."""
    prepared_optimizer: Any
    unsharded: DualEncoder | None
    """Where weights are split over processes: the encoder once more, whole and on the CPU, to be judged."""


def set_up(config: Config, resume: bool, rewound: bool) -> Setup:
    """Build everything, go back to the newest checkpoint where told, and take the run's folder.

    Raises:
        UserError: bad input; nothing was written.
    """
    config = build.resolve(config)
    accelerator = build_accelerator(config)
    ours = current_world(equal_batches=True, ring=config.train.exchange == "ring")
    check(config, ours.size, resume)
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    console = Console(stderr=True, quiet=ours.rank != 0)
    say = partial(console.print, soft_wrap=True, highlight=False)
    tokenizer = build.build_tokenizer(config, config.run_dir / "tokenizer")
    task = _build_task(config, tokenizer, accelerator, ours, say)
    stream = build.build_loader(config, task, tokenizer, config.run_dir / "bad_samples.jsonl")
    schedules = build.objective_options(config)
    run = RunState(micro_batch=_micro_batch(config, task, schedules, accelerator, say))
    unsharded = copy.deepcopy(task.encoder).cpu() if accelerator.distributed_type == "FSDP" else None
    if config.train.compile:
        task.encoder.vision.compile()
        task.encoder.text.compile(dynamic=True)
    prepare_sharding(accelerator, task)
    configure_ddp(accelerator, task, schedules)
    optimizer = build_optimizer(task.named_parameters(), config.optim)
    model, prepared_optimizer = accelerator.prepare(task, optimizer)
    ema = Ema(task.encoder, config.train.ema) if config.train.ema is not None else None
    setup = Setup(
        config=config,
        accelerator=accelerator,
        world=ours,
        console=console,
        tokenizer=tokenizer,
        schedules=schedules,
        views=build.build_views(config, task),
        length=training_length(config.train, config.data.batch_size, stream.samples_per_epoch),
        trained=Trained(task, optimizer, ema, stream, accelerator.scaler, run),
        model=model,
        prepared_optimizer=prepared_optimizer,
        unsharded=unsharded,
    )
    if resume:
        _go_back(setup, rewound, say)
    _take_folder(setup, resume)
    return setup


def _build_task(
    config: Config, tokenizer: Tokenizer, accelerator: Accelerator, ours: World, say: Callable[[str], None]
) -> TrainingTask:
    """The dual encoder with its objectives, on its device."""
    torch.manual_seed(torch_seed(config.seed, "weights"))
    encoder = build.build_encoder(config, tokenizer, say)
    if config.train.activation_checkpointing:
        encoder.vision.checkpoint_activations()
        encoder.text.checkpoint_activations()
    task = build.build_task(config, encoder, tokenizer, ours)
    if config.train.sync_batch_norm and ours.size > 1:
        synchronize_batch_norm(task, ours, accelerator.device)
    task.to(accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return task


def _micro_batch(
    config: Config,
    task: TrainingTask,
    schedules: dict[str, ObjectiveOptions],
    accelerator: Accelerator,
    say: Callable[[str], None],
) -> int | None:
    """As configured, or as many samples as fit."""
    if config.train.micro_batch != "auto":
        return config.train.micro_batch
    rows = config.data.batch_size // task.world.size
    weights = {name: options.weight for name, options in schedules.items() if options.weight > 0}
    found, why = fit_micro_batch(task, rows, config.model.text.max_tokens, weights, accelerator)
    say(f"train.micro_batch=auto: {why}")
    return found


def _go_back(setup: Setup, rewound: bool, say: Callable[[str], None]) -> None:
    """Restore the newest checkpoint that is whole; a run without one starts anew."""
    run_dir, run = setup.config.run_dir, setup.trained.run
    if rewound and setup.world.rank == 0:
        say(rewind(run_dir))
    setup.world.barrier()
    found = newest_checkpoint(run_dir / "checkpoints")
    if found is None:
        say(f"no checkpoint in {run_dir / 'checkpoints'}: starting from the beginning")
        return
    path, passed = found
    chosen = run.micro_batch
    for line in [*(f"passed over: {line}" for line in passed), *state.restore(path, setup.trained)]:
        say(line)
    if setup.config.train.micro_batch == "auto" and chosen is not None and run.micro_batch is not None:
        # Dropout is drawn by micro-batch: as before, if that fits.
        chosen = min(chosen, run.micro_batch)
    run.micro_batch = chosen
    setup.trained.stream.skip(batches_past(run_dir, step_of(path)))


def _take_folder(setup: Setup, resume: bool) -> None:
    """Make the run's folder, with what is known at its start, and begin the trackers."""
    config, step = setup.config, setup.trained.run.step
    # Whoever still looks whether the folder is free must not find it taken by process 0.
    setup.world.barrier()
    if setup.world.rank == 0:
        create_run_dir(config, resume)
        record_start(config.run_dir, step, setup.world.size, setup.trained.stream.state_dict())
        folder = config.run_dir / "tokenizer"
        if not folder.is_dir():
            # Whole, or not at all if this is killed.
            partial_folder = folder.with_name(".writing-tokenizer")
            setup.tokenizer.save(partial_folder)
            partial_folder.rename(folder)
    setup.world.barrier()
    setup.accelerator.init_trackers("tensorboard", init_kwargs=tracker_options(step))


_LOAD_ON_ONE = "FSDP_CPU_RAM_EFFICIENT_LOADING"
PACKED = "shards"
"""Folder of a run for the shards that were packed for it; it may be there before the run begins."""


def is_available(run: Path) -> bool:
    """Whether a run may begin in a folder: it does not exist, or holds packed shards alone."""
    return not run.exists() or (run.is_dir() and [path.name for path in run.iterdir()] == [PACKED])


def build_accelerator(config: Config) -> Accelerator:
    """Accelerate's object for this process; there must be one at most.

    Raises:
        UserError: the precision does not exist on this device, or the launcher asks for what is done here otherwise.
    """
    precision = config.train.precision
    if precision == "fp16" and not torch.cuda.is_available():
        raise UserError("train.precision=fp16 needs a GPU; use bf16 or fp32")
    # Accelerate keeps one precision a process; a training before this one, in a notebook, may have had another.
    AcceleratorState._reset_state()
    # A launcher's default. It leaves pretrained weights of transformers out on all processes but one, and then sends
    # parameters only: Accelerate (1.15) knows no buffers there. Here every process builds the whole model.
    os.environ[_LOAD_ON_ONE] = "false"
    accelerator = Accelerator(
        mixed_precision="no" if precision == "fp32" else precision,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        log_with=list(config.train.trackers) or None,
        project_dir=str(config.run_dir),
    )
    if accelerator.gradient_accumulation_steps != 1:
        raise UserError(
            f"accelerate is told to accumulate gradients over {accelerator.gradient_accumulation_steps} steps; use "
            f"train.micro_batch, which keeps the gradient that of the whole batch, and leave "
            f"--gradient_accumulation_steps out"
        )
    return accelerator


def check(config: Config, world_size: int, resume: bool) -> None:
    """What can be refused before anything is built.

    Raises:
        UserError: the run exists already, shards or data sets are missing, the batch does not divide, or the schedules
            leave a step without an objective.
    """
    if not resume and not is_available(config.run_dir):
        raise UserError(
            f"run_dir={config.run_dir} exists; pick another, or go on with it: mmssl train --resume {config.run_dir}"
        )
    if config.data.batch_size % world_size:
        raise UserError(
            f"data.batch_size={config.data.batch_size} does not divide by the {world_size} processes; pick a "
            f"multiple of {world_size}"
        )
    check_schedules(config)
    resolve_sources(config.data.train, config.data.allow_pipe)
    for name, entry in config.evaluate.suites.items():
        open_dataset(entry.data, name=name)


def check_schedules(config: Config) -> None:
    """Raises UserError where there may be a step at which no objective acts."""
    gap = first_gap(config.objectives.values())
    if gap is not None:
        raise UserError(
            f"objectives: after {gap:.0%} of the training there are steps at which none acts; let one act from start=0 "
            f"to end=1 without ramp and every, for example contrastive"
        )


def create_run_dir(config: Config, resume: bool) -> None:
    """Make the run's folder and write its configuration.

    Raises:
        UserError: it cannot be written.
    """
    run = config.run_dir
    try:
        run.mkdir(parents=True, exist_ok=resume or is_available(run))
        atomic_write(run / "config.yaml", dump_config(config).encode())
    except OSError as error:
        raise UserError(f"run_dir={run} cannot be written: {error.strerror}; pick another folder") from None


def tracker_options(step: int) -> dict[str, dict[str, Any]]:
    """What each tracker must know to go on at `step`, so that steps that are done again do not appear twice."""
    return {"tensorboard": {"purge_step": step + 1}}
