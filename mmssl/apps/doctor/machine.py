"""Facts about this machine, as plain values."""

import importlib
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil
import torch
from packaging.requirements import Requirement

from mmssl import system
from mmssl.precision import Precision, product_milliseconds

SHARED_MEMORY = Path("/dev/shm")
VARIABLES = ("CUDA_VISIBLE_DEVICES", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "RANK", "WORLD_SIZE")
"""Environment variables that affect devices, threads and launching."""


@dataclass(frozen=True)
class Device:
    """One GPU."""

    name: str
    total: int
    """Total memory in bytes."""
    free: int
    """Free memory in bytes."""
    bf16: bool
    """True if the GPU computes bfloat16 in hardware."""


@dataclass(frozen=True)
class SystemFacts:
    """Facts that the checks assess. Sizes are in bytes."""

    versions: Mapping[str, str]
    """Versions of Python and the main packages."""
    unmet: Mapping[str, str]
    """Requirement of mmssl that is not met -> installed version, or `missing`."""
    vision_unmet: Mapping[str, str]
    """Likewise for the requirements of torchvision."""
    vision_error: str | None
    """Error when importing torchvision. None: it works."""
    extras: Mapping[str, bool]
    """Name of an extra -> True if all of its packages are installed."""
    devices: Sequence[Device]
    cuda_build: str | None
    """CUDA version of this PyTorch build. None: built for CPUs."""
    driver: bool
    """True if the system has a device file of an NVIDIA driver."""
    product_ms: Mapping[str, float]
    """Precision -> milliseconds of a product of two square matrices of `mmssl.precision.SIDE` rows."""
    shared_memory: int | None
    """Free shared memory. None: no /dev/shm."""
    open_files: int | None
    """Soft limit of open files per process. None: no limit."""
    cores: int
    """Number of cores that this process may use."""
    quota: float | None
    """CPU time that a container grants, in cores. None: no limit."""
    threads: int
    """Number of threads of PyTorch operations."""
    memory: int
    """Available main memory."""
    memory_limit: int | None
    """Main memory that a container grants. None: no limit."""
    folder: str
    """Folder of the runs."""
    disk: int
    """Free disk space in `folder`."""
    environment: Mapping[str, str]
    """The VARIABLES that are set."""
    launch_file: str | None
    """Text of the file written by `accelerate config`. None: no such file."""


def gather(folder: Path) -> SystemFacts:
    """Collect the facts of this machine, which takes seconds. `folder` is where runs are written."""
    devices = [_device(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return SystemFacts(
        versions={"python": platform.python_version(), **_versions("torch", "torchvision", "transformers")},
        unmet=unmet("mmssl"),
        vision_unmet=unmet("torchvision"),
        vision_error=_import_error("torchvision"),
        extras=_extras(),
        devices=devices,
        cuda_build=torch.version.cuda,
        driver=any(Path("/dev").glob("nvidia[0-9]*")),
        product_ms=_products("cuda" if devices else "cpu"),
        shared_memory=shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else None,
        open_files=system.open_file_limit(),
        cores=len(system.allowed_cores()),
        quota=system.cpu_quota(system.CONTROL_GROUP),
        threads=torch.get_num_threads(),
        memory=psutil.virtual_memory().available,
        memory_limit=system.memory_limit(system.CONTROL_GROUP),
        folder=str(folder.resolve()),
        disk=shutil.disk_usage(folder).free,
        environment={name: os.environ[name] for name in VARIABLES if name in os.environ},
        launch_file=system.read_text(_launch_file()),
    )


def _products(device_type: str) -> dict[str, float]:
    formats: tuple[Precision, ...] = ("fp32", "bf16", "fp16") if device_type == "cuda" else ("fp32", "bf16")
    times = {name: product_milliseconds(device_type, name) for name in formats}
    return {name: time for name, time in times.items() if time is not None}


def _device(number: int) -> Device:
    free, total = torch.cuda.mem_get_info(number)
    # By compute capability: PyTorch also reports support where bfloat16 is emulated.
    bf16 = torch.cuda.get_device_capability(number) >= (8, 0) or torch.version.hip is not None
    return Device(torch.cuda.get_device_name(number), total, free, bf16)


def unmet(package: str, extra: str = "") -> dict[str, str]:
    """Requirements of an installed package that are not met -> installed version, or `missing`."""
    found = {}
    for requirement in map(Requirement, metadata.requires(package) or [] if _versions(package) else []):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        version = _versions(requirement.name).get(requirement.name, "missing")
        if version == "missing" or not requirement.specifier.contains(version, prereleases=True):
            found[f"{requirement.name}{requirement.specifier}"] = version
    return found


def _extras() -> dict[str, bool]:
    """Extras of mmssl, except those for its own tests and documentation."""
    names = (metadata.metadata("mmssl").get_all("Provides-Extra") or []) if _versions("mmssl") else []
    base = unmet("mmssl").keys()
    return {name: unmet("mmssl", name).keys() <= base for name in names if name not in ("test", "docs")}


def _versions(*packages: str) -> dict[str, str]:
    """Installed version of each package that is installed."""
    found = {}
    for package in packages:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def _import_error(module: str) -> str | None:
    """First line of the error when importing a module. A mismatch of compiled libraries may raise anything."""
    try:
        importlib.import_module(module)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def _launch_file() -> Path:
    """Configuration file of `accelerate config` and `accelerate launch`."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "huggingface"
    return Path(os.environ.get("HF_HOME", cache)).expanduser() / "accelerate" / "default_config.yaml"
