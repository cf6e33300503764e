"""Each check reports its facts, with a remedy for every problem."""

from typing import Any

import pytest

from mmssl.apps.doctor import Finding, State, examine, worst
from mmssl.cli.doctor import _print_table
from tests.helpers.doctor_facts import GIB, GPU, facts


def finding(name: str, **changes: Any) -> Finding:
    """Result of the check `name` on a machine without problems but for the changes."""
    return next(f for f in examine(facts(**changes)) if f.name == name)


def test_a_machine_without_problems_passes() -> None:
    """With and without a GPU, every check passes, and check names are unique."""
    for changes in ({}, {"devices": [GPU], "driver": True, "product_ms": {"fp32": 1.0, "bf16": 0.1, "fp16": 0.1}}):
        found = examine(facts(**changes))
        assert worst(found) == "ok", found
        assert [f.remedy for f in found] == [""] * len(found)
        assert len({f.name for f in found}) == len(found)


WRONG: list[tuple[str, State, dict[str, Any], str, str]] = [
    ("packages", "error", {"unmet": {"torch>=9": "2.8.0"}}, "2.8.0 (needs torch>=9)", "pip install 'torch>=9'"),
    ("packages", "error", {"unmet": {"nothere": "missing"}}, "missing (needs nothere)", "pip install 'nothere'"),
    (
        "torch and torchvision",
        "error",
        {"vision_error": "RuntimeError: operator torchvision::nms does not exist"},
        "operator torchvision::nms does not exist",
        "torch==2.8.0",
    ),
    (
        "torch and torchvision",
        "error",
        {"vision_unmet": {"torch==2.7.1": "2.8.0"}},
        "needs torch==2.7.1",
        "torchvision",
    ),
    ("devices", "error", {"driver": True}, "CUDA 12.8 cannot use it", "driver"),
    ("devices", "error", {"driver": True, "cuda_build": None}, "built for CPUs", "CUDA build"),
    ("devices", "warning", {"driver": True, "environment": {"CUDA_VISIBLE_DEVICES": ""}}, "hides", "unset"),
    ("shared memory", "warning", {"shared_memory": 64 * 2**20}, "0.06 GiB", "--shm-size"),
    ("open files", "warning", {"open_files": 1024}, "1,024", "ulimit -n"),
    ("cores", "warning", {"threads": 16}, "8 cores; 16 PyTorch threads", "train.threads=8"),
    ("cores", "warning", {"quota": 2.5}, "grants 2.5", "train.threads=2"),
    ("cores", "warning", {"quota": 0.5, "threads": 2}, "grants 0.5", "train.threads=1"),
    (
        "cores",
        "warning",
        {"threads": 1, "environment": {"OMP_NUM_THREADS": "1"}},
        "1 PyTorch threads",
        "OMP_NUM_THREADS",
    ),
    ("memory", "warning", {"memory_limit": GIB}, "1.0 GiB", "micro_batch"),
    ("disk", "warning", {"disk": 4 * GIB}, "4.0 GiB free in /runs", "run_dir"),
    ("disk", "error", {"disk": GIB // 4}, "0.2 GiB", "run_dir"),
    ("launcher", "warning", {"environment": {"MASTER_ADDR": "a"}}, "without WORLD_SIZE", "torchrun"),
    ("launcher", "error", {"environment": {"WORLD_SIZE": "4"}}, "wait", "unset WORLD_SIZE"),
    ("launcher", "error", {"launch_file": "a: 1\ndistributed_type: DEEPSPEED\n"}, "DEEPSPEED", "FSDP"),
]


@pytest.mark.parametrize(("name", "state", "changes", "found", "remedy"), WRONG)
def test_every_problem_has_a_remedy(name: str, state: State, changes: dict[str, Any], found: str, remedy: str) -> None:
    """One wrong fact changes the state of its check alone, which names the fact and the remedy."""
    one = finding(name, **changes)
    assert one.state == state
    assert found in one.found
    assert remedy in one.remedy
    assert [f.name for f in examine(facts(**changes)) if f.state != "ok"] == [name]
    assert worst(examine(facts(**changes))) == state


def test_the_variables_of_torchrun_are_fine() -> None:
    """The variables of torchrun are consistent."""
    environment = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500", "RANK": "0", "WORLD_SIZE": "4"}
    assert finding("launcher", environment=environment).state == "ok"


def test_an_old_gpu_is_warned_of_bf16() -> None:
    """A GPU that emulates bfloat16 is named, with the precisions it supports."""
    old = type(GPU)("Old GPU", GIB, GIB, False)
    one = finding("precision", devices=[old], product_ms={"fp32": 1.0, "bf16": 0.5, "fp16": 0.2})
    assert one.state == "warning"
    assert "Old GPU emulates bf16" in one.found
    assert "fp16" in one.remedy


def test_a_slow_bf16_is_no_problem_but_is_told() -> None:
    """A CPU that emulates bf16 is sound: the check names the factor and what `train.precision: auto` takes."""
    one = finding("precision", product_ms={"fp32": 10.0, "bf16": 30.0})
    assert one.state == "ok"
    assert "bf16 takes 3.00" in one.found
    assert "train.precision=auto takes fp32" in one.found


def test_missing_extras_are_not_a_problem() -> None:
    """Missing extras are listed with the command that installs them, present ones by name."""
    one = finding("extras", extras={"parquet": True, "search": False})
    assert (one.state, one.found) == ("ok", "present: parquet; missing: search")
    assert "pip install 'mmssl[search]'" in one.remedy


def test_an_unlimited_number_is_not_small() -> None:
    """-1 means no limit of open files; a system without /dev/shm passes."""
    assert finding("open files", open_files=-1).found == "no limit"
    assert finding("shared memory", shared_memory=None).state == "ok"


def test_the_table_can_be_read_in_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was found and its remedy stand below each other, on lines of forty characters or more."""
    monkeypatch.setenv("COLUMNS", "80")
    words = "RuntimeError: operator torchvision::nms does not exist in this installation of the library"
    _print_table([Finding("torch and torchvision", "error", words, "pip install torch==2.8.0")])
    lines = [line.strip("│┃ ") for line in capsys.readouterr().out.splitlines()]
    assert max(map(len, lines)) <= 80
    assert any("→ pip install torch==2.8.0" in line for line in lines)
    assert any("operator torchvision::nms" in line for line in lines)
