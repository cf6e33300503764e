"""The new objective of docs/objectives.md."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mmssl.objectives import find_objective, objective_names
from mmssl.train.step import Step, backward
from tests.helpers.docs_blocks import blocks
from tests.helpers.objective_batch import Plain, batch, tiny_task

PAGE = Path(__file__).parents[2] / "docs" / "objectives.md"


@pytest.fixture
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The page's code as a module of a user, in the working folder."""
    (block,) = blocks(PAGE, "python")
    (tmp_path / "my_lab").mkdir()
    (tmp_path / "my_lab" / "brightness.py").write_text(block.code, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    yield "my_lab.brightness"
    for name in ("my_lab", "my_lab.brightness"):
        sys.modules.pop(name, None)
    find_objective.cache_clear()


def test_the_pages_objective_is_found_and_learns(added: str) -> None:
    """As it stands on the page it is found by its dotted path, takes its default weight, and its loss halves."""
    assert find_objective(added).Options().weight == 0.1
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
    """The table has one row per built-in objective."""
    rows = re.findall(r"^\| `(\w+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(rows) == objective_names()
