"""What the facts of a machine mean for training. Every check is a function of values and looks at nothing itself."""

import re
from collections.abc import Callable, Mapping, Sequence

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from mmssl.apps.doctor.finding import Finding
from mmssl.apps.doctor.system import SystemFacts

GIB = 2**30
SHARED_MEMORY = 1 * GIB
"""Below, worker processes run out of it: three batches of 256 images of 224 px are 116 MB, and containers have 64."""
OPEN_FILES = 4096
MEMORY = 4 * GIB
"""What the smallest shipped configurations need."""
DISK = 10 * GIB
"""Some checkpoints of a ViT-B with its optimizer, at 1.8 GB each."""
FULL = GIB // 2
FASTER = 0.9
"""A number format pays if a product takes less than this part of float32's time."""


def examine(facts: SystemFacts) -> list[Finding]:
    """Every check of the machine, in the order in which a problem of one explains those of the next."""
    return [check(facts) for check in CHECKS]


def python(facts: SystemFacts) -> Finding:
    """The interpreter's version."""
    if SpecifierSet(facts.python_range).contains(facts.python, prereleases=True):
        return Finding("python", "ok", facts.python)
    remedy = f"make an environment with Python {facts.python_range}"
    return Finding("python", "error", f"{facts.python}, supported is {facts.python_range}", remedy)


def packages(facts: SystemFacts) -> Finding:
    """Every package that is needed is there, in a version that is supported."""
    wrong = _unmet(facts.requirements, facts.installed)
    if not wrong:
        shown = [f"{name} {facts.installed[name]}" for name in ("torch", "transformers") if name in facts.installed]
        return Finding("packages", "ok", f"{', '.join(shown)}; {len(facts.requirements)} requirements are met")
    wanted = " ".join(f"'{requirement}'" for requirement in wrong)
    found = ", ".join(f"{r.name} {facts.installed.get(r.name, 'missing')}" for r in wrong)
    return Finding("packages", "error", found, f"pip install {wanted}")


def torchvision(facts: SystemFacts) -> Finding:
    """torchvision was built for the PyTorch that is installed."""
    name = "torch and torchvision"
    torch, vision = facts.installed.get("torch", "missing"), facts.installed.get("torchvision", "missing")
    found = f"torch {torch}, torchvision {vision}"
    remedy = f"install both from one index and at once: pip install --force-reinstall 'torch=={torch}' torchvision"
    if facts.vision_error is not None:
        return Finding(name, "error", f"{found}; importing torchvision fails: {facts.vision_error}", remedy)
    torch_alone = [r for r in facts.vision_needs if r.name == "torch"]
    if _unmet(torch_alone, facts.installed):
        return Finding(name, "error", f"{found}, which wants {torch_alone[0]}", remedy)
    return Finding(name, "ok", found)


def devices(facts: SystemFacts) -> Finding:
    """GPUs, or why there are none."""
    hidden = facts.environment.get("CUDA_VISIBLE_DEVICES")
    if facts.devices:
        shown = "; ".join(f"{d.name}, {d.free / GIB:.1f} of {d.total / GIB:.1f} GiB free" for d in facts.devices)
        return Finding("devices", "ok", shown)
    if not facts.driver:
        return Finding("devices", "ok", "no GPU; the CPU computes")
    if facts.cuda_build is None:
        remedy = "install the CUDA build of PyTorch: pytorch.org/get-started names the command"
        return Finding("devices", "error", "there is a GPU, but this PyTorch is built for CPUs", remedy)
    if hidden in ("", "-1"):
        found = f"CUDA_VISIBLE_DEVICES={hidden!r} hides the GPUs"
        return Finding("devices", "warning", found, "unset CUDA_VISIBLE_DEVICES to use them")
    found = f"there is a GPU, but PyTorch for CUDA {facts.cuda_build} cannot use it"
    return Finding("devices", "error", found, "update the driver, or install a PyTorch built for an older CUDA")


def precision(facts: SystemFacts) -> Finding:
    """Whether a short number format makes products faster here."""
    plain = facts.product_ms["fp32"]
    ratios = {name: time / plain for name, time in facts.product_ms.items() if name != "fp32"}
    found = f"a product of 1024 x 1024 takes {plain:.1f} ms in fp32; " + ", ".join(
        f"{name} takes {ratio:.2f} of that" for name, ratio in ratios.items()
    )
    old = [device.name for device in facts.devices if not device.bf16]
    if old:
        return Finding("precision", "warning", f"{found}; {old[0]} emulates bf16", "set train.precision=fp16 or fp32")
    if ratios["bf16"] > FASTER:
        remedy = "set train.precision=fp32; bf16 gains nothing here but memory"
        return Finding("precision", "warning", found, remedy)
    return Finding("precision", "ok", found)


def shared_memory(facts: SystemFacts) -> Finding:
    """Room for images that worker processes hand over."""
    if facts.shared_memory is None:
        return Finding("shared memory", "ok", "this system has no /dev/shm")
    found = f"{facts.shared_memory / GIB:.2f} GiB free in /dev/shm"
    if facts.shared_memory >= SHARED_MEMORY:
        return Finding("shared memory", "ok", found)
    remedy = "start the container with --shm-size 8g, or keep data.worker_kind=thread, which needs none"
    return Finding("shared memory", "warning", found, remedy)


def open_files(facts: SystemFacts) -> Finding:
    """How many files a process may open."""
    # -1 means no limit.
    if facts.open_files is None or facts.open_files < 0:
        return Finding("open files", "ok", "no limit")
    if facts.open_files >= OPEN_FILES:
        return Finding("open files", "ok", f"up to {facts.open_files:,}")
    found = f"a process may open {facts.open_files:,} files"
    return Finding("open files", "warning", found, f"ulimit -n {16 * OPEN_FILES} before training on many shards")


def cores(facts: SystemFacts) -> Finding:
    """Whether PyTorch uses as many threads as there are cores to run them."""
    granted = facts.cores if facts.quota is None else min(facts.cores, facts.quota)
    found = f"{facts.cores} cores" + (
        f", of which a container grants {facts.quota:g}" if facts.quota is not None else ""
    )
    found += f"; {facts.threads} threads for the math"
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
    """Room for checkpoints."""
    found = f"{facts.disk / GIB:.1f} GiB free in {facts.folder}"
    if facts.disk >= DISK:
        return Finding("disk", "ok", found)
    remedy = "write runs to another disk (run_dir=...), or keep fewer checkpoints (train.keep=1)"
    return Finding("disk", "error" if facts.disk < FULL else "warning", found, remedy)


def extras(facts: SystemFacts) -> Finding:
    """Optional packages. That one is missing is no fault: a command that needs it says so."""
    missing = [name for name, needs in facts.extras.items() if _unmet(needs, facts.installed)]
    there = [name for name in facts.extras if name not in missing]
    found = f"present: {', '.join(there) or 'none'}; missing: {', '.join(missing) or 'none'}"
    return Finding("extras", "ok", found, f"pip install 'mmssl[{','.join(missing)}]' for all" if missing else "")


def launcher(facts: SystemFacts) -> Finding:
    """Variables and files that make a program believe that it is one of several, or keep it from that."""
    given = facts.environment
    world_size = given.get("WORLD_SIZE", "1")
    if "MASTER_ADDR" in given and "WORLD_SIZE" not in given:
        found = f"MASTER_ADDR={given['MASTER_ADDR']} is set without WORLD_SIZE: one process would train alone"
        remedy = "start with torchrun or accelerate launch, which set both, or unset MASTER_ADDR"
        return Finding("launcher", "warning", found, remedy)
    if world_size != "1" and ("MASTER_ADDR" not in given or "RANK" not in given):
        found = f"WORLD_SIZE={world_size} is set without MASTER_ADDR and RANK: training would wait for others for ever"
        return Finding("launcher", "error", found, "unset WORLD_SIZE, or start with torchrun or accelerate launch")
    kind = re.search(r"^distributed_type:\s*'?(\w+)", facts.launch_file or "", re.MULTILINE)
    if kind is not None and kind[1] in ("DEEPSPEED", "MEGATRON_LM"):
        found = f"accelerate config chose {kind[1]}, which mmssl refuses"
        remedy = "run accelerate config again and choose FSDP version 2, or none"
        return Finding("launcher", "error", found, remedy)
    return Finding(
        "launcher", "ok", f"{world_size} processes" if world_size != "1" else "no other processes are expected"
    )


CHECKS: Sequence[Callable[[SystemFacts], Finding]] = (
    python,
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


def _unmet(requirements: Sequence[Requirement], installed: Mapping[str, str]) -> list[Requirement]:
    """Those of the requirements that no installed version satisfies."""
    return [
        r
        for r in requirements
        if r.name not in installed or not r.specifier.contains(installed[r.name], prereleases=True)
    ]
