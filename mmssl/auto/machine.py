"""What this machine has."""

import os
from pathlib import Path

import psutil
import torch

from mmssl.auto.facts import Machine

_LIMIT = Path("/sys/fs/cgroup/memory.max")
"""A container's own limit, where there is one."""


def this_machine() -> Machine:
    """What this process and those beside it on the machine may use."""
    gpus = tuple(
        torch.cuda.get_device_properties(number).total_memory
        for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    )
    return Machine(
        cores=len(os.sched_getaffinity(0)),
        memory=_memory(),
        gpu_memory=gpus,
        bf16=_multiplies_bf16(on_gpu=len(gpus) > 0),
        processes=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
    )


def _memory() -> int:
    total = int(psutil.virtual_memory().total)
    if _LIMIT.is_file() and (limit := _LIMIT.read_text().strip()).isdecimal():
        total = min(total, int(limit))
    return total


def _multiplies_bf16(on_gpu: bool) -> bool:
    """In hardware: Ampere and later; on CPUs AMX or AVX-512's bf16 instructions, as Linux names them."""
    if on_gpu:
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("flags")[2].partition("\n")[0].split()
    except OSError:
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags
