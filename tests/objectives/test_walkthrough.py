"""docs/objectives.md shows how to add an objective; here it is added."""

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import mmssl.objectives
from mmssl.objectives import objective_names
from mmssl.train.step import Step, backward
from tests.helpers.docs_blocks import blocks
from tests.helpers.objective_batch import Plain, batch, tiny_task

PAGE = Path(__file__).parents[2] / "docs" / "objectives.md"


@pytest.fixture
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The page's code as a module of the objectives' room."""
    (block,) = blocks(PAGE, "python")
    (tmp_path / "brightness.py").write_text(block.code, encoding="utf-8")
    monkeypatch.setattr(mmssl.objectives, "__path__", [*mmssl.objectives.__path__, str(tmp_path)])
    importlib.invalidate_caches()
    yield "brightness"
    sys.modules.pop("mmssl.objectives.brightness", None)


def test_the_pages_objective_is_found_and_learns(added: str) -> None:
    """As it stands on the page it is found by its name, takes its default weight, and its loss halves."""
    assert added in objective_names()
    task = tiny_task(["contrastive", added])
    optimizer = torch.optim.Adam(task.parameters(), lr=3e-3)
    losses = []
    for step in range(30):
        weights = {"contrastive": 1.0, added: 1.0}
        tally = backward(task, Step(task, batch(task), weights, 0.5, (0, "step", step), 5), Plain())
        optimizer.step()
        optimizer.zero_grad()
        total, count = tally.sums[f"{added}.loss"]
        losses.append(float(total / count))
    assert losses[-1] < losses[0] / 2


def test_the_page_lists_every_objective() -> None:
    """The table has a row for each, and for none that is not there."""
    rows = re.findall(r"^\| `(\w+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(rows) == objective_names()
