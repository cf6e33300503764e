"""What a machine has, as plain values. Nothing is judged here."""

import importlib
import os
import platform
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil
import torch
from packaging.requirements import Requirement

from mmssl import system

SHARED_MEMORY = Path("/dev/shm")
VARIABLES = ("CUDA_VISIBLE_DEVICES", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "RANK", "WORLD_SIZE")
"""Variables of the environment that decide how a program starts."""
_SIDE = 1024
_ROUNDS = 5


@dataclass(frozen=True)
class Device:
    """One GPU."""

    name: str
    total: int
    """Bytes of memory."""
    free: int
    bf16: bool
    """Whether the chip computes with bfloat16 itself."""


@dataclass(frozen=True)
class SystemFacts:
    """What the checks judge. Sizes in bytes."""

    python: str
    python_range: str
    """Versions that the package says it runs on, for example `>=3.11`."""
    requirements: Sequence[Requirement]
    """What the package needs in any case."""
    extras: Mapping[str, Sequence[Requirement]]
    """Name of an extra -> what it brings."""
    installed: Mapping[str, str]
    """Package -> version, of all that are needed and are there."""
    vision_needs: Sequence[Requirement]
    """What the installed torchvision says it needs."""
    vision_error: str | None
    """Why torchvision cannot be imported."""
    devices: Sequence[Device]
    cuda_build: str | None
    """CUDA version that this PyTorch was built for."""
    driver: bool
    """Whether the system has a device file of an NVIDIA driver."""
    product_ms: Mapping[str, float]
    """Number format -> milliseconds of a product of two 1024 x 1024 matrices under autocast."""
    shared_memory: int | None
    """Free shared memory; None on systems without /dev/shm."""
    open_files: int | None
    """Soft limit of open files per process. None: no limit."""
    cores: int
    """Cores that this process may use."""
    quota: float | None
    """Cores' worth of time that a container grants."""
    threads: int
    """Threads of PyTorch's math."""
    memory: int
    """Main memory that is available."""
    memory_limit: int | None
    """Main memory that a container grants."""
    folder: str
    disk: int
    """Free in `folder`."""
    environment: Mapping[str, str]
    """Those of VARIABLES that are set."""
    launch_file: str | None
    """What `accelerate config` wrote."""


def gather(folder: Path) -> SystemFacts:
    """Look at this machine; takes seconds. `folder` is where runs will be written."""
    requirements, extras = _requirements()
    names = {r.name for r in [*requirements, *(r for group in extras.values() for r in group)]}
    devices = [_device(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return SystemFacts(
        python=platform.python_version(),
        python_range=str(metadata.metadata("mmssl").json.get("requires_python", "")),
        requirements=requirements,
        extras=extras,
        installed={name: version for name in sorted(names) if (version := _version(name)) is not None},
        vision_needs=[Requirement(text) for text in _needs("torchvision")],
        vision_error=_import_error("torchvision"),
        devices=devices,
        cuda_build=torch.version.cuda,
        driver=any(Path("/dev").glob("nvidia[0-9]*")),
        product_ms={name: product_ms(dtype) for name, dtype in _formats(bool(devices)).items()},
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


def product_ms(dtype: torch.dtype) -> float:
    """Median time of a product of two float32 matrices under autocast to `dtype`, on the GPU if there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    left, right = torch.ones(_SIDE, _SIDE, device=device), torch.ones(_SIDE, _SIDE, device=device)
    times = []
    with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
        for _ in range(_ROUNDS):
            start = time.perf_counter()
            # Reading a number waits for the device.
            float((left @ right)[0, 0])
            times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def _formats(gpu: bool) -> dict[str, torch.dtype]:
    formats = {"fp32": torch.float32, "bf16": torch.bfloat16}
    return {**formats, "fp16": torch.float16} if gpu else formats


def _device(number: int) -> Device:
    free, total = torch.cuda.mem_get_info(number)
    # The capability of the chip: PyTorch itself also counts chips on which bfloat16 is emulated.
    bf16 = torch.cuda.get_device_capability(number) >= (8, 0) or torch.version.hip is not None
    return Device(torch.cuda.get_device_name(number), total, free, bf16)


def _requirements() -> tuple[list[Requirement], dict[str, list[Requirement]]]:
    """What the package needs here, and what each of its extras brings; those for its own tests are left out."""
    needed = [Requirement(text) for text in _needs("mmssl")]
    plain = [r for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    names = metadata.metadata("mmssl").get_all("Provides-Extra") or []
    extras = {
        name: [r for r in needed if r not in plain and r.marker is not None and r.marker.evaluate({"extra": name})]
        for name in names
        if name not in ("test", "docs")
    }
    return plain, extras


def _needs(package: str) -> list[str]:
    try:
        return metadata.requires(package) or []
    except metadata.PackageNotFoundError:
        return []


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _import_error(module: str) -> str | None:
    """The first line of what importing a module fails with; a mismatch of compiled libraries may raise anything."""
    try:
        importlib.import_module(module)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def _launch_file() -> Path:
    """Where `accelerate config` writes, and `accelerate launch` reads."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "huggingface"
    return Path(os.environ.get("HF_HOME", cache)).expanduser() / "accelerate" / "default_config.yaml"
