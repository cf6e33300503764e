"""How a run starts: what can be refused before anything is built, Accelerate's object, and the run's folder."""

import os
import platform
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs

from mmssl.config import Config, dump_config
from mmssl.data.loader import sources_of
from mmssl.evaluate.datasets import open_dataset
from mmssl.objectives.mixer import first_gap
from mmssl.train.checkpoint import write_atomically
from mmssl.types import UserError

_LOAD_ON_ONE = "FSDP_CPU_RAM_EFFICIENT_LOADING"
PACKED = "shards"
"""Folder of a run for the shards that were packed for it; it may be there before the run begins."""


def is_free(run: Path) -> bool:
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
    if accelerator.distributed_type == "FSDP" and config.mixer.balance == "gradient_norm":
        raise UserError(
            "mixer.balance=gradient_norm needs each objective's gradient, which is not measured under FSDP2; use fixed "
            "or uncertainty"
        )
    return accelerator


def check(config: Config, world: int, resume: bool) -> None:
    """What can be refused before anything is built.

    Raises:
        UserError: the run exists already, shards or data sets are missing, the batch does not divide, or the schedules
            leave a step without an objective.
    """
    if not resume and not is_free(config.run_dir):
        raise UserError(
            f"run_dir={config.run_dir} exists; pick another, or go on with it: mmssl train --resume {config.run_dir}"
        )
    if config.data.batch_size % world:
        raise UserError(
            f"data.batch_size={config.data.batch_size} does not divide by the {world} processes; pick a "
            f"multiple of {world}"
        )
    check_schedules(config)
    sources_of(config.data.train, config.data.allow_pipe)
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


def claim(config: Config, resume: bool) -> None:
    """Make the run's folder and write its configuration.

    Raises:
        UserError: it cannot be written.
    """
    run = config.run_dir
    try:
        run.mkdir(parents=True, exist_ok=resume or is_free(run))
        write_atomically(run / "config.yaml", dump_config(config).encode())
    except OSError as error:
        raise UserError(f"run_dir={run} cannot be written: {error.strerror}; pick another folder") from None


def tracker_options(step: int) -> dict[str, dict[str, Any]]:
    """What each tracker must know to go on at `step`, so that steps that are done again do not appear twice."""
    return {"tensorboard": {"purge_step": step + 1}}


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that shape a run."""
    return {
        "python": platform.python_version(),
        **{m.__name__: m.__version__ for m in (torch, accelerate, transformers)},
    }
