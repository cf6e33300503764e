"""The record that lets a run be repeated: command, versions, code and data."""

import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from mmssl.files import atomic_write

FILE = "environment.json"
PACKAGES = (
    "mmssl",
    "torch",
    "torchvision",
    "accelerate",
    "transformers",
    "tokenizers",
    "timm",
    "open_clip_torch",
    "numpy",
    "pillow",
    "simplejpeg",
)


def record_start(run_dir: Path, step: int, processes: int, stream: Mapping[str, int | str]) -> None:
    """Add this start of a run to its environment.json; a resumed run has several.

    Args:
        step: number of updates already done.
        processes: number of training processes.
        stream: the state of the stream, with the fingerprint of its shards if they have an index.
    """
    path = run_dir / FILE
    starts = _read(path)
    starts.append(
        {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "step": step,
            "command": command(sys.argv),
            "processes": processes,
            "versions": versions(),
            "platform": f"{platform.system()} {platform.machine()}, {device()}",
            "code": code(Path(__file__).parents[1]),
            "data_fingerprint": stream.get("fingerprint", "none: shards without an index"),
        }
    )
    atomic_write(path, json.dumps({"starts": starts}, indent=1).encode())


def command(argv: list[str]) -> str:
    """The command line as it can be typed again."""
    program = Path(argv[0])
    room = program.parent.name
    name = program.name if program.name != "__main__.py" else f"python -m {'' if room == 'mmssl' else 'mmssl.'}{room}"
    return f"{name} {shlex.join(argv[1:])}".strip()


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that affect a run."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def device() -> str:
    """Name of the compute device."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return f"CPU, {torch.get_num_threads()} threads"


def code(folder: Path) -> dict[str, Any] | None:
    """The commit of the code in a folder and a mark of uncommitted changes; None outside a repository."""
    try:
        _git(folder, "ls-files", "--error-unmatch", "__init__.py")
        commit = _git(folder, "rev-parse", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no", ".")
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "changed": changed != ""}


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=30
    )
    return done.stdout.strip()


def _read(path: Path) -> list[Any]:
    """Earlier starts; empty if the file is not a list of starts."""
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))["starts"])
    except (OSError, ValueError, KeyError, TypeError):
        return []
