"""Checks of a machine for training. Every check is a pure function of the collected facts."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from mmssl.apps.doctor.machine import SystemFacts
from mmssl.precision import SIDE, choose_precision

State = Literal["ok", "warning", "error"]
_ORDER: tuple[State, ...] = ("ok", "warning", "error")
GIB = 2**30
SHARED_MEMORY = 1 * GIB
"""Below this, worker processes run out of it: three batches of 256 images of 224 px take 116 MB, and containers have
64 MB by default."""
OPEN_FILES = 4096
MEMORY = 4 * GIB
"""Need of the smallest shipped configurations."""
DISK = 10 * GIB
"""Room for a few checkpoints of a ViT-B with its optimizer, at 1.8 GB each."""
FULL = GIB // 2


@dataclass(frozen=True)
class Finding:
    """Result of one check."""

    name: str
    state: State
    found: str
    remedy: str = ""
    """How to fix it. Empty: nothing to do."""


def worst(findings: Iterable[Finding]) -> State:
    """The most serious state among findings."""
    return max((finding.state for finding in findings), key=_ORDER.index, default="ok")


def examine(facts: SystemFacts) -> list[Finding]:
    """Run every check of the machine. Earlier problems may explain later ones."""
    return [check(facts) for check in CHECKS]


def packages(facts: SystemFacts) -> Finding:
    """Versions of the packages that mmssl requires."""
    if not facts.unmet:
        return Finding("packages", "ok", ", ".join(f"{name} {version}" for name, version in facts.versions.items()))
    found = ", ".join(f"{version} (needs {requirement})" for requirement, version in facts.unmet.items())
    return Finding("packages", "error", found, f"pip install {' '.join(map(repr, facts.unmet))}")


def torchvision(facts: SystemFacts) -> Finding:
    """Match of torchvision with the installed PyTorch."""
    name, torch = "torch and torchvision", facts.versions.get("torch", "missing")
    found = f"torch {torch}, torchvision {facts.versions.get('torchvision', 'missing')}"
    remedy = f"install both from one index and at once: pip install --force-reinstall 'torch=={torch}' torchvision"
    if facts.vision_error is not None:
        return Finding(name, "error", f"{found}; importing torchvision fails: {facts.vision_error}", remedy)
    wanted = next((requirement for requirement in facts.vision_unmet if re.match("torch[=<>~!]", requirement)), None)
    if wanted is not None:
        return Finding(name, "error", f"{found}, which needs {wanted}", remedy)
    return Finding(name, "ok", found)


def devices(facts: SystemFacts) -> Finding:
    """GPUs, or the reason why none is used."""
    hidden = facts.environment.get("CUDA_VISIBLE_DEVICES")
    if facts.devices:
        shown = "; ".join(f"{d.name}, {d.free / GIB:.1f} of {d.total / GIB:.1f} GiB free" for d in facts.devices)
        return Finding("devices", "ok", shown)
    if not facts.driver:
        return Finding("devices", "ok", "no GPU; training uses the CPU")
    if facts.cuda_build is None:
        remedy = "install the CUDA build of PyTorch: see pytorch.org/get-started for the command"
        return Finding("devices", "error", "the machine has a GPU, but this PyTorch is built for CPUs", remedy)
    if hidden in ("", "-1"):
        found = f"CUDA_VISIBLE_DEVICES={hidden!r} hides the GPUs"
        return Finding("devices", "warning", found, "unset CUDA_VISIBLE_DEVICES to use them")
    found = f"the machine has a GPU, but PyTorch for CUDA {facts.cuda_build} cannot use it"
    return Finding("devices", "error", found, "update the driver, or install a PyTorch built for an older CUDA")


def precision(facts: SystemFacts) -> Finding:
    """Speed of half precision on this machine."""
    plain = facts.product_ms["fp32"]
    ratios = {name: time / plain for name, time in facts.product_ms.items() if name != "fp32"}
    found = f"a product of {SIDE} x {SIDE} takes {plain:.1f} ms in fp32; " + ", ".join(
        f"{name} takes {ratio:.2f} of that" for name, ratio in ratios.items()
    )
    old = [device.name for device in facts.devices if not device.bf16]
    if old:
        return Finding("precision", "warning", f"{found}; {old[0]} emulates bf16", "set train.precision=fp16 or fp32")
    chosen = choose_precision("cuda" if facts.devices else "cpu", lambda _, name: facts.product_ms.get(name))
    return Finding("precision", "ok", f"{found}; train.precision=auto takes {chosen.precision}")


def shared_memory(facts: SystemFacts) -> Finding:
    """Shared memory for images from worker processes."""
    if facts.shared_memory is None:
        return Finding("shared memory", "ok", "this system has no /dev/shm")
    found = f"{facts.shared_memory / GIB:.2f} GiB free in /dev/shm"
    if facts.shared_memory >= SHARED_MEMORY:
        return Finding("shared memory", "ok", found)
    remedy = "start the container with --shm-size 8g, or keep data.worker_kind=thread, which does not need it"
    return Finding("shared memory", "warning", found, remedy)


def open_files(facts: SystemFacts) -> Finding:
    """Limit of open files per process."""
    # -1 means no limit.
    if facts.open_files is None or facts.open_files < 0:
        return Finding("open files", "ok", "no limit")
    if facts.open_files >= OPEN_FILES:
        return Finding("open files", "ok", f"up to {facts.open_files:,}")
    found = f"a process may open {facts.open_files:,} files"
    return Finding("open files", "warning", found, f"ulimit -n {16 * OPEN_FILES} before training on many shards")


def cores(facts: SystemFacts) -> Finding:
    """Number of PyTorch threads against the available cores."""
    granted = facts.cores if facts.quota is None else min(facts.cores, facts.quota)
    found = f"{facts.cores} cores" + (
        f", of which a container grants {facts.quota:g}" if facts.quota is not None else ""
    )
    found += f"; {facts.threads} PyTorch threads"
    if facts.threads > max(1.0, granted):
        remedy = f"set train.threads={max(1, int(granted))}, or OMP_NUM_THREADS to that"
        return Finding("cores", "warning", found, remedy)
    if facts.threads == 1 < granted and facts.environment.get("OMP_NUM_THREADS") == "1" and not facts.devices:
        return Finding("cores", "warning", found, "unset OMP_NUM_THREADS, unless several programs share the cores")
    return Finding("cores", "ok", found)


def memory(facts: SystemFacts) -> Finding:
    """Main memory."""
    granted = facts.memory if facts.memory_limit is None else min(facts.memory, facts.memory_limit)
    found = f"{granted / GIB:.1f} GiB available"
    if granted >= MEMORY:
        return Finding("memory", "ok", found)
    remedy = "set train.micro_batch=auto and a smaller data.shuffle_block, or close other programs"
    return Finding("memory", "warning", found, remedy)


def disk(facts: SystemFacts) -> Finding:
    """Disk space for checkpoints."""
    found = f"{facts.disk / GIB:.1f} GiB free in {facts.folder}"
    if facts.disk >= DISK:
        return Finding("disk", "ok", found)
    remedy = "write runs to another disk (run_dir=...), or keep fewer checkpoints (train.keep=1)"
    return Finding("disk", "error" if facts.disk < FULL else "warning", found, remedy)


def extras(facts: SystemFacts) -> Finding:
    """Optional packages. A missing one is not a problem: commands that need it report it."""
    there = [name for name, installed in facts.extras.items() if installed]
    missing = [name for name in facts.extras if name not in there]
    found = f"present: {', '.join(there) or 'none'}; missing: {', '.join(missing) or 'none'}"
    return Finding("extras", "ok", found, f"pip install 'mmssl[{','.join(missing)}]' for all" if missing else "")


def launcher(facts: SystemFacts) -> Finding:
    """Settings of the environment for training with several processes."""
    given = facts.environment
    world_size = given.get("WORLD_SIZE", "1")
    if "MASTER_ADDR" in given and "WORLD_SIZE" not in given:
        found = f"MASTER_ADDR={given['MASTER_ADDR']} is set without WORLD_SIZE: one process would train alone"
        remedy = "start with torchrun or accelerate launch, which set both, or unset MASTER_ADDR"
        return Finding("launcher", "warning", found, remedy)
    if world_size != "1" and ("MASTER_ADDR" not in given or "RANK" not in given):
        found = f"WORLD_SIZE={world_size} is set without MASTER_ADDR and RANK: training would wait for others forever"
        return Finding("launcher", "error", found, "unset WORLD_SIZE, or start with torchrun or accelerate launch")
    kind = re.search(r"^distributed_type:\s*'?(\w+)", facts.launch_file or "", re.MULTILINE)
    if kind is not None and kind[1] in ("DEEPSPEED", "MEGATRON_LM"):
        found = f"accelerate config chose {kind[1]}, which mmssl refuses"
        remedy = "run accelerate config again and choose FSDP version 2, or none"
        return Finding("launcher", "error", found, remedy)
    return Finding("launcher", "ok", f"{world_size} processes" if world_size != "1" else "a single process")


CHECKS: Sequence[Callable[[SystemFacts], Finding]] = (
    packages,
    torchvision,
    devices,
    precision,
    shared_memory,
    open_files,
    cores,
    memory,
    disk,
    launcher,
    extras,
)
