"""OpenCLIP in an environment of its own: its trainer needs another webdataset than mmssl."""

import importlib.metadata
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from mmssl.errors import UserError

PEER_PACKAGES = ("open_clip_torch==3.3.0", "webdataset==0.2.86", "pandas", "ftfy", "regex")
SHARED_PACKAGES = ("torch", "torchvision", "timm", "pillow", "numpy")
"""Installed at the versions that mmssl runs with here."""
PEER_CACHE = Path.home() / ".cache" / "mmssl-openclip"


def make_environment(folder: Path = PEER_CACHE) -> str:
    """The interpreter of an environment with OpenCLIP's trainer, made if it is not there.

    Raises:
        UserError: its packages cannot be installed.
    """
    python = folder / "bin" / "python"
    done = folder / ".complete"
    if done.is_file():
        return str(python)
    shared = [f"{name}=={importlib.metadata.version(name)}" for name in SHARED_PACKAGES]
    print(f"making OpenCLIP's environment in {folder}", file=sys.stderr)
    venv.create(folder, with_pip=True, clear=True)
    uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
    install = [uv, "pip", "install", "--python", str(python)] if uv else [str(python), "-m", "pip", "install"]
    made = subprocess.run([*install, "--quiet", *PEER_PACKAGES, *shared], stderr=subprocess.PIPE, text=True)
    if made.returncode != 0:
        reason = next(iter(made.stderr.strip().splitlines()[-1:]), f"exit status {made.returncode}")
        raise UserError(f"OpenCLIP's environment {folder} cannot be made: {reason}; give one by --peer-python")
    done.touch()
    return str(python)
