"""What this machine has."""

import os
from pathlib import Path

import psutil
import torch

from mmssl.apps.autoconfig.inputs import Machine
from mmssl.apps.doctor.system import CONTROL_GROUP, cpu_quota, memory_limit


def this_machine() -> Machine:
    """What this process and those beside it on the machine may use."""
    gpus = tuple(
        torch.cuda.get_device_properties(number).total_memory
        for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    )
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return Machine(
        cores=_cores(),
        memory=_memory(),
        gpu_memory=gpus,
        bf16=_multiplies_bf16(on_gpu=len(gpus) > 0),
        processes=processes,
        machines=max(1, int(os.environ.get("WORLD_SIZE", "1")) // processes),
    )


def _cores() -> int:
    """Whole cores that this process may use: a container may grant the time of fewer than it shows."""
    cores, quota = len(os.sched_getaffinity(0)), cpu_quota(CONTROL_GROUP)
    return cores if quota is None else max(1, min(cores, int(quota)))


def _memory() -> int:
    total, limit = int(psutil.virtual_memory().total), memory_limit(CONTROL_GROUP)
    return total if limit is None else min(total, limit)


def _multiplies_bf16(on_gpu: bool) -> bool:
    """In hardware: Ampere and later; on CPUs AMX or AVX-512's bf16 instructions, as Linux names them."""
    if on_gpu:
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("flags")[2].partition("\n")[0].split()
    except OSError:
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags
