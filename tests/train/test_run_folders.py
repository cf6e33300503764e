"""A run folder is the one that was named, whatever its name, and one process at a time trains in it."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from mmssl import system
from mmssl.api import MMSSL
from mmssl.cli import main
from mmssl.config import Config, parse_config
from mmssl.distributed import FolderLock
from mmssl.errors import UserError
from mmssl.inference import load
from mmssl.train.setup import is_available
from mmssl.train.trainer import train
from tests.helpers.tiny_runs import run_tree, write_pairs

NAMES = ["a: b", "1e3", "[x]", "{x: 1}", "exp #2", "null", "true", "0x10", "a - b", "*", "&a", "!!str", "~"]


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 small images in two tars."""
    return write_pairs(tmp_path_factory.mktemp("shards"))


def config(shards: Path, run: Path, **changes: Any) -> Config:
    return parse_config(run_tree(shards, run, evaluate={}, **changes), "test")


@pytest.fixture(scope="module")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run of 4 steps, with checkpoints of steps 3 and 4."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    train(config(shards, run, train__steps=4))
    return run


@pytest.fixture
def beside(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with `exp` and `a`, which a name with a comment or a colon must not be taken for."""
    monkeypatch.chdir(tmp_path)
    for name in ("exp", "a"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("not: touched")
    return tmp_path


def run_cli(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(words)
    return int(ended.value.code or 0)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_is_resumed_under_its_own_name(name: str, finished: Path, beside: Path) -> None:
    """`--resume NAME` goes on in that folder and in no other, and every verb that reads a run finds it."""
    shutil.copytree(finished, beside / name)
    assert run_cli("train", "--resume", name, "train.steps=5", "train.keep=9") == 0
    assert (beside / name / "checkpoints" / "step-000000005").is_dir()
    assert yaml.safe_load((beside / name / "config.yaml").read_text())["run_dir"] == name
    assert sorted(path.name for path in beside.iterdir()) == sorted({"exp", "a", name})
    assert load(name).encode_text("a red square").shape == (1, 16)
    assert MMSSL(name).encode_text("a red square").shape == (1, 16)
    assert run_cli("report", name, "--out", f"{name}/page") == 0
    shutil.copy(next(ROOT.glob("docs/images/*.png")), beside / name)
    assert run_cli("predict", name, name, "--labels", "red,blue") == 0
    assert sorted(path.name for path in beside.iterdir()) == sorted({"exp", "a", name})
    assert [(beside / known / "config.yaml").read_text() for known in {"exp", "a"} - {name}] == ["not: touched"] * 2


@pytest.fixture
def other() -> Iterator[psutil.Process]:
    """A live process that is not this one."""
    process = subprocess.Popen(["sleep", "100"])
    yield psutil.Process(process.pid)
    process.kill()
    process.wait()


def locked(run: Path, process: psutil.Process) -> None:
    """Give a run the lock of a process."""
    record = {
        "host": "here",
        "pid": process.pid,
        "machine": system.machine(),
        "started": process.create_time(),
        "since": "2026-01-01T00:00:00+00:00",
        "token": "other",
    }
    (run / FolderLock.FILE).write_text(json.dumps(record))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("rewind", [False, True])
def test_a_second_process_changes_nothing(
    rewind: bool, finished: Path, shards: Path, tmp_path: Path, other: psutil.Process
) -> None:
    """While another process trains in the folder, resuming and rewinding it are refused before a byte changes."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    locked(run, other)
    before = contents(run)
    with pytest.raises(UserError, match=rf"{run} is in use by process {other.pid} on here"):
        train(config(shards, run, train__steps=6), resume=True, rewind=rewind)
    assert contents(run) == before


def test_a_lock_left_by_a_killed_process_does_not_matter(
    finished: Path, shards: Path, tmp_path: Path, other: psutil.Process
) -> None:
    """The run goes on and leaves no lock, whether it ends well or with an error."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    locked(run, other)
    other.kill()
    with pytest.raises(UserError, match="another architecture"):
        train(config(shards, run, train__steps=6, model__embed_dim=8), resume=True)
    assert not (run / FolderLock.FILE).exists()
    train(config(shards, run, train__steps=6), resume=True)
    assert not (run / FolderLock.FILE).exists()


def test_a_lock_beside_packed_shards_leaves_the_folder_free(tmp_path: Path) -> None:
    """A process killed while it packed leaves both; the run may begin there."""
    (tmp_path / "shards").mkdir()
    assert is_available(tmp_path)
    (tmp_path / FolderLock.FILE).write_text("{}")
    assert is_available(tmp_path)
    (tmp_path / "config.yaml").write_text("")
    assert not is_available(tmp_path)


def test_a_run_that_lost_its_folder_stops_before_it_overwrites(
    shards: Path, tmp_path: Path, other: psutil.Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Taken over while it trained, it writes no checkpoint."""
    run = tmp_path / "run"
    open_log = os.fsync

    def take(handle: int) -> None:
        if (run / FolderLock.FILE).exists():
            locked(run, other)
        open_log(handle)

    monkeypatch.setattr(os, "fsync", take)
    with pytest.raises(UserError, match="was taken over"):
        train(config(shards, run))
    assert list((run / "checkpoints").glob("step-*")) == []
