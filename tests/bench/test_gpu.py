"""The checklist for a GPU, tried on a CPU: every part runs, and one that fails costs no other."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from torch import nn
from typer.testing import CliRunner

from mmssl.errors import UserError
from scripts.bench import gpu, loss, step
from scripts.bench.__main__ import app

TINY = "--device", "cpu", "--tiny"


def _here(function: Callable[..., Any], *arguments: Any) -> Any:
    """In this process: a new one takes longer to start than it measures."""
    return function(*arguments)


def test_every_part_runs_on_a_cpu(tmp_path: Path) -> None:
    """With tiny sizes: rows of all parts in both files, and equal losses on equal features and batches."""
    with (
        mock.patch.object(step, "_in_fresh_process", _here),
        mock.patch.object(gpu, "measure", loss._measure),
        mock.patch.object(nn.Module, "compile") as compiled,
    ):
        done = CliRunner().invoke(app, ["gpu", "--out", str(tmp_path), *TINY])
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert (found["errors"], done.exit_code) == ({}, 0)
    assert compiled.call_count == 2  # both towers, once
    rows = found["rows"]
    assert {row["part"] for row in rows} == set(gpu.PARTS)
    assert all(row["seconds"] > 0 for row in rows)
    ours, theirs, *_ = (row["note"].split(",")[0] for row in rows if row["part"] == "losses")
    assert ours == theirs
    table = (tmp_path / "gpu.md").read_text()
    assert "| loader | training from shards | 16 |" in table or "| loader | training from shards | 8 |" in table
    assert "data wait" in table
    assert table in done.stdout


@pytest.fixture
def parts() -> Iterator[None]:
    """Two parts, of which the first fails after its first row."""

    def broken(job: gpu.Job) -> Iterator[gpu.Row]:
        yield gpu.Row(job.name, "before", seconds=1.0)
        raise RuntimeError("no memory | none")

    def whole(job: gpu.Job) -> Iterator[gpu.Row]:
        yield gpu.Row(job.name, "all", batch=1024, seconds=0.32, pairs_per_s=3200.0, mfu=0.401, peak_bytes=2**30)

    with mock.patch.object(gpu, "PARTS", {"broken": broken, "whole": whole}):
        yield


def test_a_part_that_fails_costs_no_other(tmp_path: Path, parts: None) -> None:
    """Its rows so far stay, the report names the error, and the exit status is 1."""
    done = CliRunner().invoke(app, ["gpu", "--out", str(tmp_path), *TINY])
    assert done.exit_code == 1
    lines = (tmp_path / "gpu.md").read_text().splitlines()[4:]
    assert lines == [
        "| broken | before |  | 1,000.0 |  |  |  |  |",
        "| whole | all | 1,024 | 320.0 | 3,200 | 40.1% | 1,024 |  |",
        "| broken | failed |  |  |  |  |  | RuntimeError: no memory / none |",
    ]
    assert "in broken" in json.loads((tmp_path / "gpu.json").read_text())["errors"]["broken"]


def test_one_part_alone(tmp_path: Path, parts: None) -> None:
    """By its name; an unknown one is refused with those that there are."""
    assert CliRunner().invoke(app, ["gpu", "--out", str(tmp_path), *TINY, "--part", "whole"]).exit_code == 0
    with pytest.raises(UserError, match="broken, whole"):
        CliRunner().invoke(app, ["gpu", "--out", str(tmp_path), *TINY, "--part", "x"], catch_exceptions=False)
