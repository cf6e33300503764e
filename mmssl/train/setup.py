"""The start of a run: its objects are built once on each process, a checkpoint is restored, and its folder is made."""

import copy
import os
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedDataParallelKwargs, parse_flag_from_env
from rich.console import Console
from torch import nn

from mmssl import build, errors, system
from mmssl.build import RunPlan
from mmssl.config import CacheConfig, Config, Length, ViewConfig, dump_config
from mmssl.data.transforms import Tokenizer
from mmssl.distributed import FolderLock, World, current_world
from mmssl.errors import UserError
from mmssl.files import atomic_write, remove, set_aside
from mmssl.models import DualEncoder, batch_norm, tower_check
from mmssl.objectives import TrainingTask
from mmssl.precision import choose_precision, emulation_warning
from mmssl.rng import torch_seed
from mmssl.train import recovery, state
from mmssl.train.checkpoint import newest_checkpoint, step_of
from mmssl.train.cost import fit_micro_batch
from mmssl.train.optim import Ema, build_optimizer
from mmssl.train.parallel import configure_ddp, prepare_sharding
from mmssl.train.provenance import record_start
from mmssl.train.state import RunState, Trained

_LOAD_ON_ONE = "FSDP_CPU_RAM_EFFICIENT_LOADING"
_FOLDERS = ("checkpoints", "images", "model", "tensorboard", "tokenizer")
_FILES = (
    "bad_samples.jsonl",
    "best.json",
    "environment.json",
    "evaluations.jsonl",
    "metrics.jsonl",
    "results.json",
    "rewound.json",
    "sample_ids.jsonl",
)
PACKED = "shards"
"""Folder of a run for shards packed for it; it may exist before the run begins."""
MicroBatchFit = Callable[[TrainingTask, int, int, Mapping[str, float], Accelerator], tuple[int, str]]
"""As `fit_micro_batch`: the micro-batch and the reason for it."""


@dataclass(frozen=True)
class Setup:
    """One process of a run, ready to train."""

    plan: RunPlan
    accelerator: Accelerator
    world: World
    console: Console
    """Silent on every process but the first."""
    tokenizer: Tokenizer
    views: dict[str, ViewConfig]
    length: Length
    trained: Trained
    """The objects whose state a checkpoint holds."""
    model: nn.Module
    """The training task as prepared by Accelerate."""
    prepared_optimizer: Any
    unsharded: DualEncoder | None
    """Under FSDP: an unsharded CPU copy of the encoder, used for evaluation."""
    lock: FolderLock
    """The lock of the run's folder, held by process 0."""


def set_up(plan: RunPlan, resume: bool, rewind: bool, fit: MicroBatchFit = fit_micro_batch) -> Setup:
    """Build everything, restore the newest checkpoint if asked to, and take the run's folder.

    Args:
        rewind: with `resume`, restart from the last checkpoint before the bad batches and skip them.
        fit: measures the micro-batch for `train.micro_batch: auto`.

    Raises:
        UserError: bad input, or another process works in the run's folder; nothing was written.
    """
    lock = FolderLock(plan.config.run_dir, partial(print, file=sys.stderr))
    try:
        if resume and plan.config.run_dir.is_dir():
            _lock(plan.config.run_dir, lock)
        return _set_up(plan, resume, rewind, fit, lock)
    except BaseException:
        lock.release()
        raise


def _set_up(plan: RunPlan, resume: bool, rewind: bool, fit: MicroBatchFit, lock: FolderLock) -> Setup:
    plan, precision_notes = _with_precision(plan)
    config = plan.config
    accelerator = build_accelerator(config)
    world = current_world(equal_batches=True, ring=config.train.exchange == "ring")
    check_start(config, world.size, resume)
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    if plan.suites:
        from mmssl.evaluate import suite  # a run without evaluation does not load the tasks

        suite.check_readable(plan.suites)
    console = errors.console(stderr=True, quiet=world.rank != 0)
    say = partial(console.print, soft_wrap=True, highlight=False, markup=False)
    for line in (*precision_notes, *_cache_notes(config.data.cache)):
        say(line)
    tokenizer = build.build_tokenizer(plan, config.run_dir / "tokenizer")
    task = _build_task(plan, tokenizer, accelerator, world, say)
    stream = build.build_loader(plan, task, tokenizer, config.run_dir / "bad_samples.jsonl", say)
    task.on_data(lambda: stream.samples)
    run = RunState(micro_batch=_micro_batch(plan, task, accelerator, fit, say))
    unsharded = copy.deepcopy(task.encoder).cpu() if accelerator.distributed_type == "FSDP" else None
    compile_towers(task.encoder, config)
    prepare_sharding(accelerator, task)
    configure_ddp(accelerator, task, plan.objectives)
    optimizer = build_optimizer(task.named_parameters(), config.optim)
    model, prepared_optimizer = accelerator.prepare(task, optimizer)
    ema = Ema(task.encoder, config.train.ema) if config.train.ema is not None else None
    setup = Setup(
        plan=plan,
        accelerator=accelerator,
        world=world,
        console=console,
        tokenizer=tokenizer,
        views=build.build_views(config, task),
        length=config.train.length(config.data.batch_size, lambda: stream.samples_per_epoch),
        trained=Trained(task, optimizer, ema, stream, accelerator.scaler, run),
        model=model,
        prepared_optimizer=prepared_optimizer,
        unsharded=unsharded,
        lock=lock,
    )
    if resume:
        _restore(setup, rewind, say)
    _take_folder(setup, resume, say)
    return setup


def _with_precision(plan: RunPlan) -> tuple[RunPlan, list[str]]:
    """The plan with `train.precision: auto` resolved, the same on every process, and lines to say about it."""
    # Joins the processes, so that the first one's measurement decides for all.
    # With the launcher's own flag, or Accelerate would take a launch on CPUs for single processes.
    device_type = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).device.type
    configured = plan.config.train.precision
    if configured != "auto":
        warning = emulation_warning(configured, device_type)
        return plan, [] if warning is None else [f"warning: {warning}"]
    precision, reason = current_world().broadcast(choose_precision(device_type))
    train = plan.config.train.model_copy(update={"precision": precision})
    resolved = replace(plan, config=plan.config.model_copy(update={"train": train}))
    return resolved, [f"train.precision=auto: {precision}, as {reason}"]


def _cache_notes(cache: CacheConfig) -> list[str]:
    """The line of the log about a cache of resized images."""
    if cache.resize is None:
        return []
    return [
        f"images are shrunk to {cache.resize} px and kept in {cache.dir}, at most {cache.gib:g} GiB: from the second "
        "epoch on the originals of what is kept are neither read nor decoded"
    ]


def _build_task(
    plan: RunPlan, tokenizer: Tokenizer, accelerator: Accelerator, world: World, say: Callable[[str], None]
) -> TrainingTask:
    """The dual encoder with its objectives, on its device."""
    config = plan.config
    torch.manual_seed(torch_seed(config.seed, "weights"))
    encoder = build.build_encoder(config, tokenizer, say)
    if config.train.activation_checkpointing:
        encoder.vision.checkpoint_activations()
        encoder.text.checkpoint_activations()
    task = build.build_task(plan.objectives, encoder, tokenizer, world)
    if config.train.sync_batch_norm and world.size > 1:
        batch_norm.synchronize_batch_norm(task, world, accelerator.device)
    if accelerator.device.type == "cpu":
        system.keep_freed_memory()
    task.to(accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    for line in tower_check.check_towers(encoder):
        say(line)
    return task


def _micro_batch(
    plan: RunPlan, task: TrainingTask, accelerator: Accelerator, fit: MicroBatchFit, say: Callable[[str], None]
) -> int | None:
    """The configured micro-batch, or the largest that fits."""
    config = plan.config
    if config.train.micro_batch != "auto":
        return config.train.micro_batch
    rows = config.data.batch_size // task.world.size
    weights = {name: options.weight for name, options in plan.objectives.items() if options.weight > 0}
    found, reason = fit(task, rows, config.model.text.max_tokens, weights, accelerator)
    say(f"train.micro_batch=auto: {reason}")
    return found


def _restore(setup: Setup, rewind: bool, say: Callable[[str], None]) -> None:
    """Restore the newest undamaged checkpoint; a run without one starts from the beginning."""
    config, run, task = setup.plan.config, setup.trained.run, setup.trained.task
    if rewind and setup.world.rank == 0:
        say(recovery.rewind(config.run_dir))
    setup.world.barrier()
    found = newest_checkpoint(config.run_dir / "checkpoints")
    if found is None:
        say(f"no checkpoint in {config.run_dir / 'checkpoints'}: starting from the beginning")
        return
    path, passed = found
    fitting = run.micro_batch
    for line in [*(f"passed over: {line}" for line in passed), *state.restore(path, setup.trained)]:
        say(line)
    for name in task.names:
        task.objective(name).on_resume()
    if config.train.micro_batch == "auto" and fitting is not None and run.micro_batch is not None:
        # Dropout is drawn per micro-batch, so keep the old size if it fits.
        fitting = min(fitting, run.micro_batch)
    run.micro_batch = fitting
    try:
        setup.trained.stream.skip(recovery.batches_past(config.run_dir, step_of(path)))
    except ValueError as error:
        say(f"warning: {error}: batches that an earlier --rewind skipped are trained on again")


def _take_folder(setup: Setup, resume: bool, say: Callable[[str], None]) -> None:
    """Make the run's folder with everything known at the start, and begin the trackers."""
    config, step = setup.plan.config, setup.trained.run.step
    # No process may find the folder taken by process 0 while it still checks whether it is free.
    setup.world.barrier()
    if setup.world.rank == 0:
        create_run_dir(config, resume)
        _lock(config.run_dir, setup.lock)
        for line in clear_the_way(config.run_dir):
            say(f"warning: {line}")
        record_start(config.run_dir, step, setup.world.size, setup.trained.stream.state_dict())
        folder = config.run_dir / "tokenizer"
        if not folder.is_dir():
            # A kill in between must not leave half a tokenizer.
            partial_folder = folder.with_name(".writing-tokenizer")
            remove(partial_folder)
            setup.tokenizer.save(partial_folder)
            partial_folder.rename(folder)
    setup.world.barrier()
    # Replayed steps must not be logged twice.
    setup.accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": step + 1}})


def _lock(run_dir: Path, lock: FolderLock) -> None:
    """Take the lock of the run's folder, on process 0.

    Raises:
        UserError: another process works there, or it cannot be written.
    """
    if system.rank() > 0:
        return
    try:
        lock.acquire()
    except OSError as error:
        raise UserError(f"run_dir={run_dir} cannot be written: {error.strerror}; pick another folder") from None


def clear_the_way(run_dir: Path) -> list[str]:
    """Set aside files where the run writes folders, and folders where it writes files. One line for each."""
    found = [run_dir / name for name in (*_FOLDERS, *_FILES)]
    wrong = [path for path in found if os.path.lexists(path) and not _is_usable(path)]
    return [
        f"{path} is no {'folder' if path.name in _FOLDERS else 'file'}; it is set aside as {set_aside(path)}"
        for path in wrong
    ]


def _is_usable(path: Path) -> bool:
    return path.is_dir() if path.name in _FOLDERS else path.is_file()


def is_available(run: Path) -> bool:
    """True if a run may begin in this folder: it does not exist, or holds nothing but packed shards and a lock."""
    return not run.exists() or (run.is_dir() and {path.name for path in run.iterdir()} - {FolderLock.FILE} == {PACKED})


def compile_towers(encoder: DualEncoder, config: Config) -> None:
    """Compile both towers in place if the configuration says so."""
    if config.train.compile:
        encoder.vision.compile()
        encoder.text.compile(dynamic=True)


def build_accelerator(config: Config) -> Accelerator:
    """Accelerate's object for this process; a process must have only one.

    Raises:
        UserError: the device lacks the precision, or the launcher asks for gradient accumulation.
    """
    precision = config.train.precision
    if precision == "fp16" and not torch.cuda.is_available():
        raise UserError("train.precision=fp16 needs a GPU; use bf16 or fp32")
    # Accelerate keeps one precision per process; an earlier training in the same notebook may have used another.
    AcceleratorState._reset_state()
    # The launcher's default loads pretrained transformers weights on one process and sends parameters only: Accelerate
    # (1.15) omits buffers there. Here every process builds the whole model.
    os.environ[_LOAD_ON_ONE] = "false"
    accelerator = Accelerator(
        mixed_precision="no" if precision == "fp32" else precision,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        log_with=list(config.train.trackers) or None,
        project_dir=str(config.run_dir),
    )
    if accelerator.gradient_accumulation_steps != 1:
        raise UserError(
            f"accelerate is set to accumulate gradients over {accelerator.gradient_accumulation_steps} steps; leave "
            f"--gradient_accumulation_steps out and use train.micro_batch, which keeps the gradient of the whole batch"
        )
    return accelerator


def resume_command(run_dir: Path) -> str:
    """The command that goes on with a run, as a shell takes it."""
    return f"mmssl train --resume {shlex.quote(str(run_dir))}"


def check_start(config: Config, world_size: int, resume: bool) -> None:
    """Refuse a run that cannot start here.

    Raises:
        UserError: the run exists already, or the batch does not divide.
    """
    if not resume and not is_available(config.run_dir):
        raise UserError(
            f"run_dir={config.run_dir} exists; pick another, or go on with it: {resume_command(config.run_dir)}"
        )
    if config.data.batch_size % world_size:
        raise UserError(
            f"data.batch_size={config.data.batch_size} does not divide by the {world_size} processes; pick a "
            f"multiple of {world_size}"
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
