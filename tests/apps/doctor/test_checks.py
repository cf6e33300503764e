"""Each check says what it is given facts for, with a remedy where something is to be done."""

from typing import Any

import pytest
from packaging.requirements import Requirement

from mmssl.apps.doctor import Finding, State, examine, worst
from tests.helpers.doctor_facts import GIB, GPU, facts


def finding(name: str, **changes: Any) -> Finding:
    """What is found of `name` on a sound machine with changes."""
    return next(f for f in examine(facts(**changes)) if f.name == name)


def test_a_sound_machine_has_nothing_to_mend() -> None:
    """With and without a GPU, every check is passed, and each has a name of its own."""
    for changes in ({}, {"devices": [GPU], "driver": True, "product_ms": {"fp32": 1.0, "bf16": 0.1, "fp16": 0.1}}):
        found = examine(facts(**changes))
        assert worst(found) == "ok", found
        assert [f.remedy for f in found] == [""] * len(found)
        assert len({f.name for f in found}) == len(found)


WRONG: list[tuple[str, State, dict[str, Any], str, str]] = [
    ("python", "error", {"python": "3.9.1"}, "3.9.1", "Python >=3.11"),
    ("packages", "error", {"requirements": [Requirement("torch>=9")]}, "torch 2.8.0", "pip install 'torch>=9'"),
    ("packages", "error", {"requirements": [Requirement("nothere")]}, "nothere missing", "pip install 'nothere'"),
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
        {"vision_needs": [Requirement("torch==2.7.1")]},
        "wants torch==2.7.1",
        "torchvision",
    ),
    ("devices", "error", {"driver": True}, "CUDA 12.8 cannot use it", "driver"),
    ("devices", "error", {"driver": True, "cuda_build": None}, "built for CPUs", "CUDA build"),
    ("devices", "warning", {"driver": True, "environment": {"CUDA_VISIBLE_DEVICES": ""}}, "hides", "unset"),
    ("precision", "warning", {"product_ms": {"fp32": 10.0, "bf16": 30.0}}, "bf16 takes 3.00", "train.precision=fp32"),
    ("shared memory", "warning", {"shared_memory": 64 * 2**20}, "0.06 GiB", "--shm-size"),
    ("open files", "warning", {"open_files": 1024}, "1,024", "ulimit -n"),
    ("cores", "warning", {"threads": 16}, "8 cores; 16 threads", "train.threads=8"),
    ("cores", "warning", {"quota": 2.5}, "grants 2.5", "train.threads=2"),
    ("cores", "warning", {"quota": 0.5, "threads": 2}, "grants 0.5", "train.threads=1"),
    ("cores", "warning", {"threads": 1, "environment": {"OMP_NUM_THREADS": "1"}}, "1 threads", "OMP_NUM_THREADS"),
    ("memory", "warning", {"memory_limit": GIB}, "1.0 GiB", "micro_batch"),
    ("disk", "warning", {"disk": 4 * GIB}, "4.0 GiB free in /runs", "run_dir"),
    ("disk", "error", {"disk": GIB // 4}, "0.2 GiB", "run_dir"),
    ("launcher", "warning", {"environment": {"MASTER_ADDR": "a"}}, "without WORLD_SIZE", "torchrun"),
    ("launcher", "error", {"environment": {"WORLD_SIZE": "4"}}, "wait", "unset WORLD_SIZE"),
    ("launcher", "error", {"launch_file": "a: 1\ndistributed_type: DEEPSPEED\n"}, "DEEPSPEED", "FSDP"),
]


@pytest.mark.parametrize(("name", "state", "changes", "found", "remedy"), WRONG)
def test_what_is_wrong_is_said_with_its_remedy(
    name: str, state: State, changes: dict[str, Any], found: str, remedy: str
) -> None:
    """One fact that is wrong changes the state of its check and no other, and names the fact and the way out."""
    one = finding(name, **changes)
    assert one.state == state
    assert found in one.found
    assert remedy in one.remedy
    assert [f.name for f in examine(facts(**changes)) if f.state != "ok"] == [name]
    assert worst(examine(facts(**changes))) == state


def test_a_group_of_processes_is_no_trap() -> None:
    """What torchrun sets belongs together."""
    environment = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500", "RANK": "0", "WORLD_SIZE": "4"}
    assert finding("launcher", environment=environment).state == "ok"


def test_an_old_gpu_is_told_of_bf16() -> None:
    """A chip that emulates bfloat16 is named, with the formats that it has."""
    old = type(GPU)("Old GPU", GIB, GIB, False)
    one = finding("precision", devices=[old], product_ms={"fp32": 1.0, "bf16": 0.5, "fp16": 0.2})
    assert one.state == "warning"
    assert "Old GPU emulates bf16" in one.found
    assert "fp16" in one.remedy


def test_missing_extras_are_no_fault() -> None:
    """They are listed with the line that installs them; one that is there is listed as such."""
    one = finding("extras", installed={"torch": "2.8.0", "fsspec": "1", "s3fs": "2025.1"})
    assert (one.state, one.found) == ("ok", "present: s3; missing: search")
    assert "pip install 'mmssl[search]'" in one.remedy


def test_no_limit_is_no_small_one() -> None:
    """-1, which stands for no limit of open files, is not below it; a system without /dev/shm lacks nothing."""
    assert finding("open files", open_files=-1).found == "no limit"
    assert finding("shared memory", shared_memory=None).state == "ok"
