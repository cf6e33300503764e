"""What a run writes down so that it can be repeated."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from mmssl.train.provenance import code, command, record_start


def test_every_start_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run has both of its command lines, with the step each began at, and the versions installed."""
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/mmssl", "train", "a file.yaml", "optim.lr=1e-3"])
    record_start(tmp_path, 0, 1, {"fingerprint": "abc"})
    monkeypatch.setattr(sys, "argv", ["/somewhere/mmssl/train/__main__.py", "--resume", "runs/x"])
    record_start(tmp_path, 40, 2, {"fingerprint": "abc"})
    first, second = json.loads((tmp_path / "environment.json").read_text())["starts"]
    assert first["command"] == "mmssl train 'a file.yaml' optim.lr=1e-3"
    assert second["command"] == "python -m mmssl.train --resume runs/x"
    assert [(s["step"], s["processes"], s["data_fingerprint"]) for s in (first, second)] == [
        (0, 1, "abc"),
        (40, 2, "abc"),
    ]
    assert first["versions"]["torch"] == version("torch")


def test_a_damaged_record_is_begun_anew(tmp_path: Path) -> None:
    """A record that cannot be read keeps no run from starting."""
    (tmp_path / "environment.json").write_text('{"starts": [')
    record_start(tmp_path, 3, 1, {})
    (start,) = json.loads((tmp_path / "environment.json").read_text())["starts"]
    assert start["step"] == 3
    assert "without an index" in start["data_fingerprint"]


def test_the_package_itself_is_named_plainly() -> None:
    """`python -m mmssl` is called so."""
    assert command(["/x/mmssl/__main__.py", "train"]) == "python -m mmssl train"


def test_the_commit_of_the_code_is_found(tmp_path: Path) -> None:
    """Code in a repository has a commit, and it is told when it was changed since; code in none has no commit."""
    assert code(tmp_path) is None
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.com"]
        done = subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], capture_output=True, check=True)
        return done.stdout.decode().strip()

    git("init", "-q")
    assert code(package) is None
    git("add", ".")
    git("commit", "-q", "-m", "first")
    assert code(package) == {"commit": git("rev-parse", "HEAD"), "changed": False}
    (package / "__init__.py").write_text("1\n")
    found = code(package)
    assert found is not None
    assert found["changed"]
