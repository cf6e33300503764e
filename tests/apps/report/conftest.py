"""A finished run whose class names and captions try to break out of the page."""

import json
import shutil
from pathlib import Path

import pytest

from mmssl.apps.report import write_card
from mmssl.config import parse_config
from mmssl.train.trainer import train
from tests.helpers.tiny_runs import run_tree, write_pairs

HOSTILE = (
    "<script>window.hacked = 1</script>",
    '"><img src=x onerror="window.hacked = 2">',
    "</script><b>bold</b> {{ 7 * 7 }}",
    "' onmouseover='window.hacked = 3" + "W" * 150,
)


@pytest.fixture(scope="session")
def hostile_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps, judged on classes with hostile names and on captions."""
    shards = write_pairs(tmp_path_factory.mktemp("hostile"))
    (shards / "classnames.txt").write_text("\n".join(HOSTILE))
    run = tmp_path_factory.mktemp("runs") / "hostile"
    suites = {
        "colors": {"data": str(shards / "*.tar")},
        "found": {"data": str(shards / "*.tar"), "task": "retrieval"},
    }
    train(parse_config(run_tree(shards, run, train__steps=30, evaluate__suites=suites, evaluate__every=10), "test"))
    write_card(run)
    (run / "explain").mkdir()
    (run / "explain" / "sanity.json").write_text(json.dumps(SANITY))
    return run


@pytest.fixture(scope="session")
def second_run(hostile_run: Path) -> Path:
    """The same run under another name, with another learning rate and a prediction changed."""
    other = hostile_run.parent / "second"
    shutil.copytree(hostile_run, other)
    config = other / "config.yaml"
    config.write_text(config.read_text().replace("lr: 0.002", "lr: 0.001"))
    return other


CURVE = {"mean": [0.5, 0.2], "low": [0.4, 0.1], "high": [0.6, 0.3], "area": 0.35, "below_random": 0.1}
SANITY = {
    "images": 6,
    "cells": 8,
    "default": "occlusion",
    "fractions": [0.0, 1.0],
    "curves": {
        name: {**CURVE, "below_random_interval": [0.05, 0.15]} for name in ("occlusion", "similarity", "random order")
    },
    "shuffled": {name: {"correlation": 0.1, "interval": [0.0, 0.2]} for name in ("occlusion", "similarity")},
}
