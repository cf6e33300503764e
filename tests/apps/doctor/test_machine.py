"""Facts read from this machine."""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from mmssl.apps.doctor import gather
from mmssl.system import cpu_quota, memory_limit


def test_limits_of_a_container_are_read(tmp_path: Path) -> None:
    """Both versions of control groups are read, with a limit, without one, and missing."""
    second = tmp_path / "second"
    (second).mkdir()
    (second / "cpu.max").write_text("150000 100000\n")
    (second / "memory.max").write_text("1073741824\n")
    assert (cpu_quota(second), memory_limit(second)) == (1.5, 2**30)
    (second / "cpu.max").write_text("max 100000\n")
    (second / "memory.max").write_text("max\n")
    assert (cpu_quota(second), memory_limit(second)) == (None, None)
    first = tmp_path / "first"
    for place, text in {
        "cpu/cpu.cfs_quota_us": "200000",
        "cpu/cpu.cfs_period_us": "100000",
        "memory/memory.limit_in_bytes": str(2**31),
    }.items():
        (first / place).parent.mkdir(parents=True, exist_ok=True)
        (first / place).write_text(text)
    assert (cpu_quota(first), memory_limit(first)) == (2.0, 2**31)
    (first / "cpu/cpu.cfs_quota_us").write_text("-1")
    (first / "memory/memory.limit_in_bytes").write_text(str(2**63 - 4096))
    assert (cpu_quota(first), memory_limit(first)) == (None, None)
    assert (cpu_quota(tmp_path), memory_limit(tmp_path)) == (None, None)


def test_this_machine_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions, sizes and times are those of this process; only relevant variables are kept."""
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("SECRET", "x")
    found = gather(tmp_path)
    assert found.versions["python"] == sys.version.split()[0]
    assert found.versions["torch"] == metadata.version("torch")
    assert found.unmet == {}
    assert found.extras["search"] is True
    assert set(found.extras).isdisjoint({"test", "docs"})
    assert found.vision_error is None
    assert found.product_ms["fp32"] > 0
    assert found.disk > 0
    assert found.environment["MASTER_ADDR"] == "localhost"
    assert "SECRET" not in found.environment


def test_the_command_works_where_torchvision_cannot_be_imported(tmp_path: Path) -> None:
    """With a broken torchvision on the path, the command still runs, reports it, and ends with exit code 1."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    root = str(Path(__file__).parents[3])
    done = subprocess.run(
        [sys.executable, "-m", "mmssl", "doctor", "--json"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": f"{tmp_path}:{root}", "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    (vision,) = [f for f in report["findings"] if f["name"] == "torch and torchvision"]
    assert report["state"] == vision["state"] == "error"
    assert "operator torchvision::nms does not exist" in vision["found"]
    assert "pip install" in vision["remedy"]
