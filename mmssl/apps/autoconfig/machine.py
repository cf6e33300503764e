"""What this machine has."""

from pathlib import Path

import torch

from mmssl import system
from mmssl.apps.autoconfig.inputs import Machine


def this_machine() -> Machine:
    """What this process and those beside it on the machine may use."""
    gpus = tuple(
        torch.cuda.get_device_properties(number).total_memory
        for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    )
    processes = system.local_world_size()
    return Machine(
        cores=system.cores(),
        memory=system.memory(),
        gpu_memory=gpus,
        bf16=_multiplies_bf16(on_gpu=len(gpus) > 0),
        processes=processes,
        machines=max(1, system.world_size() // processes),
    )


def _multiplies_bf16(on_gpu: bool) -> bool:
    """In hardware: Ampere and later; on CPUs AMX or AVX-512's bf16 instructions, as Linux names them."""
    if on_gpu:
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("flags")[2].partition("\n")[0].split()
    except OSError:
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags
