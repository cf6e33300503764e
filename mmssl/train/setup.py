"""What a run is made of: the objects that one process trains with, built once."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import nn

from mmssl import build
from mmssl.config import Config, ViewConfig
from mmssl.data.tokens import Tokenizer
from mmssl.distributed import Processes, processes
from mmssl.models.batch_norm import synchronize_batch_norm
from mmssl.models.dual_encoder import DualEncoder
from mmssl.objectives.base import ObjectiveOptions
from mmssl.objectives.mixer import Mixer
from mmssl.rng import torch_seed
from mmssl.train import state
from mmssl.train.checkpoint import newest_checkpoint, step_of
from mmssl.train.ema import Ema
from mmssl.train.environment import record_start
from mmssl.train.fit import fitting_micro_batch
from mmssl.train.length import Length, training_length
from mmssl.train.optim import build_optimizer
from mmssl.train.rewind import batches_past, rewind
from mmssl.train.shard import prepare_sharding
from mmssl.train.start import build_accelerator, check, claim, tracker_options
from mmssl.train.state import RunState, Trained
from mmssl.train.unused import tell_ddp


@dataclass(frozen=True)
class Setup:
    """One process of a run, ready to train."""

    config: Config
    """With everything written out that follows from it."""
    accelerator: Accelerator
    processes: Processes
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
    judged: DualEncoder | None
    """Where weights are split over processes: the encoder once more, whole and on the CPU, to be judged."""


def set_up(config: Config, resume: bool, rewound: bool) -> Setup:
    """Build everything, go back to the newest checkpoint where told, and take the run's folder.

    Raises:
        UserError: bad input; nothing was written.
    """
    config = build.resolved(config)
    accelerator = build_accelerator(config)
    ours = processes(even=True, ring=config.train.exchange == "ring")
    check(config, ours.world, resume)
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    console = Console(stderr=True, quiet=ours.rank != 0)
    say = partial(console.print, soft_wrap=True, highlight=False)
    tokenizer = build.build_tokenizer(config, config.run_dir / "tokenizer")
    mixer = _build_mixer(config, tokenizer, accelerator, ours, say)
    stream = build.build_stream(config, mixer, tokenizer, config.run_dir / "bad_samples.jsonl")
    schedules = build.objective_options(config)
    run = RunState(micro_batch=_micro_batch(config, mixer, schedules, accelerator, say))
    judged = copy.deepcopy(mixer.encoder).cpu() if accelerator.distributed_type == "FSDP" else None
    if config.train.compile:
        mixer.encoder.vision.compile()
        mixer.encoder.text.compile(dynamic=True)
    prepare_sharding(accelerator, mixer)
    tell_ddp(accelerator, mixer, schedules)
    optimizer = build_optimizer(mixer.named_parameters(), config.optim)
    model, prepared_optimizer = accelerator.prepare(mixer, optimizer)
    ema = Ema(mixer.encoder, config.train.ema) if config.train.ema is not None else None
    setup = Setup(
        config=config,
        accelerator=accelerator,
        processes=ours,
        console=console,
        tokenizer=tokenizer,
        schedules=schedules,
        views=build.build_views(config, mixer),
        length=training_length(config.train, config.data.batch_size, stream.samples_per_epoch),
        trained=Trained(mixer, optimizer, ema, stream, accelerator.scaler, run),
        model=model,
        prepared_optimizer=prepared_optimizer,
        judged=judged,
    )
    if resume:
        _go_back(setup, rewound, say)
    _take_folder(setup, resume)
    return setup


def _build_mixer(
    config: Config, tokenizer: Tokenizer, accelerator: Accelerator, ours: Processes, say: Callable[[str], None]
) -> Mixer:
    """The dual encoder with its objectives, on its device."""
    torch.manual_seed(torch_seed(config.seed, "weights"))
    encoder = build.build_encoder(config, tokenizer, say)
    if config.train.activation_checkpointing:
        encoder.vision.checkpoint_activations()
        encoder.text.checkpoint_activations()
    mixer = build.build_mixer(config, encoder, tokenizer, ours)
    if config.train.sync_batch_norm and ours.world > 1:
        synchronize_batch_norm(mixer, ours, accelerator.device)
    mixer.to(accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return mixer


def _micro_batch(
    config: Config,
    mixer: Mixer,
    schedules: dict[str, ObjectiveOptions],
    accelerator: Accelerator,
    say: Callable[[str], None],
) -> int | None:
    """As configured, or as many samples as fit."""
    if config.train.micro_batch != "auto":
        return config.train.micro_batch
    rows = config.data.batch_size // mixer.processes.world
    weights = {name: options.weight for name, options in schedules.items() if options.weight > 0}
    found, why = fitting_micro_batch(mixer, rows, config.model.text.max_tokens, weights, accelerator)
    say(f"train.micro_batch=auto: {why}")
    return found


def _go_back(setup: Setup, rewound: bool, say: Callable[[str], None]) -> None:
    """Restore the newest checkpoint that is whole; a run without one starts anew."""
    run_dir, run = setup.config.run_dir, setup.trained.run
    if rewound and setup.processes.rank == 0:
        say(rewind(run_dir))
    setup.processes.barrier()
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
    setup.processes.barrier()
    if setup.processes.rank == 0:
        claim(config, resume)
        record_start(config.run_dir, step, setup.processes.world, setup.trained.stream.state_dict())
        folder = config.run_dir / "tokenizer"
        if not folder.is_dir():
            # Whole, or not at all if this is killed.
            partial_folder = folder.with_name(".writing-tokenizer")
            setup.tokenizer.save(partial_folder)
            partial_folder.rename(folder)
    setup.processes.barrier()
    setup.accelerator.init_trackers("tensorboard", init_kwargs=tracker_options(step))
