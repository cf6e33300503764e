"""Where the blocks of a page run: a folder with what its readers have."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from mmssl.config import parse_config
from mmssl.train.trainer import train
from tests.helpers import docs_commands as commands
from tests.helpers.docs_blocks import ROOT, Block
from tests.helpers.tiny_runs import run_tree, write_pairs

LINKED = ("configs", "scripts", "docs")
RUNS = ("runs/quickstart", "runs/mine", "runs/a", "runs/b")
"""Runs that pages take as given."""


def make_stock(folder: Path) -> Path:
    """A folder with a tiny trained run and datasets, from which stages are made; takes seconds."""
    pairs = folder / "pairs"
    pairs.mkdir(parents=True)
    write_pairs(pairs)
    tree = run_tree(pairs, folder / "run", train__steps=2, evaluate={})
    # The smallest tower that timm has, which every export can hold.
    tree["model"]["vision"] = {"name": "timm:test_vit"}
    train(parse_config(tree, "the stage"))
    return folder


def make_stage(stock: Path, folder: Path, *, tutorial: bool) -> Path:
    """A folder in which to run a page.

    A tutorial begins with the repository alone. Other pages take for granted trained runs (all of them tiny), photos,
    and shards of pairs with classes in data/, also for training.
    """
    folder.mkdir()
    for name in LINKED:
        (folder / name).symlink_to(ROOT / name)
    # A copy, since a page may write there.
    shutil.copytree(ROOT / "shards", folder / "shards")
    if tutorial:
        return folder
    for name in RUNS:
        shutil.copytree(stock / "run", folder / name)
    for name in ("pairs", "held-out"):
        shutil.copytree(stock / "pairs", folder / "data" / name)
    _pets(folder / "data" / "pets")
    _photos(folder)
    return folder


def _pets(folder: Path) -> None:
    """A dataset of two classes with a training split and a metadata field."""
    folder.mkdir()
    for split in ("train", "test"):
        with tarfile.open(folder / f"{split}-0.tar", "w") as tar:
            for number in range(48):
                image = io.BytesIO()
                Image.new("RGB", (24, 24), (200, 5 * number, 60 if number % 2 else 220)).save(image, "PNG")
                fields = json.dumps({"camera": f"camera {number % 3}"}).encode()
                members = {"png": image.getvalue(), "cls": str(number % 2).encode(), "json": fields}
                for extension, data in members.items():
                    info = tarfile.TarInfo(f"{number:03}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    (folder / "classnames.txt").write_text("cat\ndog\n")


def _photos(folder: Path) -> None:
    (folder / "photos").mkdir()
    for number, name in enumerate(("photo.jpg", "apple.png", "a.png", "b.png", "photos/one.png", "photos/two.jpg")):
        Image.new("RGB", (40, 30), (60 * number % 256, 200, 30)).save(folder / name)
    for name in ("one", "two"):
        (folder / "photos" / f"{name}.txt").write_text(f"photo {name}")


def run_block(block: Block, folder: Path, names: dict[str, Any]) -> None:
    """Run a block in a folder, or save it there. Python's names stay for the page's next blocks."""
    if block.file is not None:
        path = folder / block.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.tested, encoding="utf-8")
        return
    with contextlib.chdir(folder):
        if block.language == "python":
            code = "\n" * (block.line - 1) + block.tested
            with _importable(folder):
                exec(compile(code, str(block.page), "exec"), names)
            return
        for part in _parts(commands.lines(block.tested)):
            if commands.is_plain(part):
                commands.run(part)
            else:
                _shell(part, folder, str(block))


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Modules of a folder can be imported, as in a Python that was started there."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _parts(code: list[str]) -> Iterator[str]:
    """Lines that call `mmssl` alone each by itself, those between them together."""
    together: list[str] = []
    for line in code:
        if commands.is_plain(line):
            if together:
                yield "\n".join(together)
            together = []
            yield line
        else:
            together.append(line)
    if together:
        yield "\n".join(together)


def _shell(code: str, folder: Path, where: str) -> None:
    """Run lines of shell code with the programs of this environment."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache")}
    command = ["bash", "-euo", "pipefail", "-c", code.replace(".venv/bin/", "")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{where}:\n{code}\n{done.stdout}\n{done.stderr}"
