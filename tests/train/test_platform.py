"""Training and evaluation where Linux-only calls are missing, as on macOS and Windows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

from tests.helpers.tiny_runs import run_tree, write_pairs

ROOT = Path(__file__).parents[2]
WITHOUT_LINUX = """
import os, sys, psutil  # psutil itself uses `resource` on Linux
for name in ("sched_getaffinity", "sched_setaffinity"):
    if hasattr(os, name):
        delattr(os, name)
sys.modules["resource"] = None
from mmssl.config import load_config
from mmssl.train.trainer import train
train(load_config(sys.argv[1]))
"""


def test_a_run_needs_no_linux_calls(tmp_path: Path) -> None:
    """Without os.sched_getaffinity, os.sched_setaffinity and the module resource, a run trains two steps and evaluates
    its model."""
    shards = tmp_path / "shards"
    shards.mkdir()
    tree = run_tree(write_pairs(shards), tmp_path / "run", train__steps=2)
    del tree["data"]["workers"]  # the default counts cores
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WITHOUT_LINUX, str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["colors/zero_shot"]["samples"] == 48
