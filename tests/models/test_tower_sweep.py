"""Every kind of tower at tiny size: it works, or is refused in one line. The table stands in docs/towers.md.

`python -m tests.models.test_tower_sweep` writes the table anew.
"""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import transformers

from mmssl.models import tower_check
from mmssl.models.tower_check import TowerReport
from tests.helpers.tower_types import TEXT, VISION, text_config, vision_config

PAGE = Path(__file__).parents[2] / "docs" / "towers.md"
MARKS = ("<!-- table: begin -->", "<!-- table: end -->")
REFUSED = {
    "ViT of one channel",
    "ViT of a size that is not square",
    "EfficientFormer at a size it does not take",
    "mra",
    "nystromformer",
    "lilt",
    "perceiver",
    "reformer",
    "t5gemma",
}
"""Kinds that cannot work: impossible inputs, and encoders of transformers that do not run in this form."""


@cache
def reports() -> dict[str, TowerReport]:
    """Label -> report on each kind."""
    transformers.logging.set_verbosity_error()
    found = {kind: tower_check.examine_vision(kind, vision_config(kind)) for kind in VISION}
    return found | {kind: tower_check.examine_text(kind, text_config(kind)) for kind in TEXT}


def lines() -> Iterator[str]:
    """The table in Markdown."""
    yield "| tower | built from | works | tokens | subsets | checkpointing | unlocking | remarks |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for kind, report in reports().items():
        source = VISION[kind][0] if kind in VISION else kind.partition(" ")[0]
        if report.problem is not None:
            yield f"| {kind} | `{source}` | refused | | | | | {_cell(report.problem)} |"
            continue
        able = ["yes" if ability else "no" for ability in (report.subsets, report.checkpointing, report.unlocking)]
        cells = [kind, f"`{source}`", "yes", report.tokens, *able, _cell("; ".join(report.remarks))]
        yield f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "/")


@pytest.mark.slow
def test_every_kind_of_tower_works_or_is_refused_in_one_line() -> None:
    """At least 60 vision and 40 text kinds; those that cannot work are refused without a line break, all others give
    different inputs different vectors, whatever else is in the batch. No library's error comes through."""
    assert len(VISION) >= 60
    assert len(TEXT) >= 40
    refused = {kind: report.problem for kind, report in reports().items() if report.problem is not None}
    assert set(refused) == REFUSED, refused
    assert all("\n" not in problem for problem in refused.values())
    assert len(refused) <= 0.1 * len(reports())


@pytest.mark.slow
def test_the_table_of_the_page_is_that_of_the_sweep() -> None:
    """docs/towers.md shows what the towers of this version do."""
    assert table_of(PAGE.read_text(encoding="utf-8")) == "\n".join(lines())


def table_of(page: str) -> str:
    """The table between the marks of a page."""
    return page.split(MARKS[0])[1].split(MARKS[1])[0].strip()


if __name__ == "__main__":
    before, rest = PAGE.read_text(encoding="utf-8").split(MARKS[0])
    text = "\n".join([before + MARKS[0], "", *lines(), "", MARKS[1] + rest.split(MARKS[1])[1]])
    PAGE.write_text(text, encoding="utf-8")
