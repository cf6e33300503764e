"""The script that kills and resumes training sees what it claims to see."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import kill_resume

ROOT = Path(__file__).parents[2]


def test_logs_are_read_to_their_last_whole_line_and_compared_by_step(tmp_path: Path) -> None:
    """A line cut by a kill is not read; a step with other samples, in another order, or beyond the end differs."""
    lines = [json.dumps({"step": step, "ids": [step, step + 1]}) for step in (1, 2, 3)]
    (tmp_path / "sample_ids.jsonl").write_text("\n".join(lines)[:-4])
    found = kill_resume.read_ids(tmp_path)
    assert found == {1: [1, 2], 2: [2, 3]}
    assert kill_resume.read_ids(tmp_path / "none") == {}
    assert kill_resume.differing(found, {1: [1, 2], 2: [2, 3], 3: [3, 4]}) == 0
    assert kill_resume.differing(found, {1: [2, 1], 2: [2, 3]}) == 1
    assert kill_resume.differing(found, {1: [1, 2]}) == 1


@pytest.mark.slow
def test_a_run_killed_three_times_sees_the_same_samples() -> None:
    """The script itself, on the smallest configuration, with 1 and 2 processes."""
    options = ["--kills", "3", "--most-steps", "6", "--processes", "1", "2"]
    done = subprocess.run(
        [sys.executable, "scripts/kill_resume.py", *options], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 kills" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("place", [[], ["--remote"]], ids=["local", "remote"])
def test_a_run_killed_at_any_moment_ends_equal_to_the_bit(place: list[str]) -> None:
    """One kill of each kind, one of them inside a checkpoint's write, with shards on a disk and on a web server:
    weights, optimizer, samples and metrics are equal."""
    options = ["--exact", "--kills", "7", "--checkpoint-steps", "2", "--set", "data.batch_size=16", *place]
    done = subprocess.run(
        [sys.executable, "scripts/kill_resume.py", *options], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for kind in kill_resume.MOMENTS:
        assert f"({kind}, SIG" in done.stdout
    assert "equal to the bit" in done.stdout
