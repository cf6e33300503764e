"""The reference is made from the code and is whole."""

import re
from typing import Any

import pytest
import typer.main

from mmssl.cli import app
from mmssl.config import Config, known_keys
from mmssl.objectives import objective_names
from tests.helpers.docs_blocks import ROOT
from tests.helpers.docs_scripts import load_script

reference = load_script("docs_reference")


def test_every_key_has_a_row_with_its_meaning() -> None:
    """Each key that the configuration knows is in a table once, and none lacks its sentence."""
    page = reference.configuration()
    rows = re.findall(r"^\| `([^`]+)` \| (.+?) \| (.*?) \| (.+) \|$", page, re.MULTILINE)
    keys = [key for key, *_ in rows]
    assert len(keys) == len(set(keys))
    plain = {re.sub(r"(\.NAME|\[\])", "", key) for key in keys}
    assert set(known_keys(Config)) <= plain
    assert [key for key, *_, meaning in rows if len(meaning.strip()) < 5] == []
    for name in objective_names():
        assert f"### objectives.{name}" in page


@pytest.mark.parametrize("page", reference.PAGES)
def test_the_pages_of_the_repository_are_whole(page: str) -> None:
    """The pages hold the reference, made from the code as it is; `python -m scripts.docs_reference` writes it anew."""
    text = (ROOT / "docs" / "reference" / page).read_text(encoding="utf-8")
    assert reference.filled(page, text) == text
    assert len(text.splitlines()) > 300


def test_values_and_defaults_are_said() -> None:
    """Bounds, choices, defaults and free names are those of the model."""
    page = reference.configuration()
    for row in (
        "| `data.batch_size` | integer, at least 1 | `256` | Global batch size: pairs per step over all processes. |",
        "| `train.precision` | `auto`, `fp32`, `bf16`, `fp16` | `auto` | Number format of the forward pass.",
        "| `run_dir` | path | required | Folder the run writes; it must not exist unless resumed. |",
        "| `evaluate.suites.NAME.task` | ",
        "| `objectives.mlm.mask_ratio` | ",
    ):
        assert row in page


def test_every_verb_and_option_is_there() -> None:
    """Each verb has a heading and each of its options a row."""
    page = reference.command_line()
    for path, command in verbs(typer.main.get_command(app), "mmssl"):
        part = re.search(rf"^##+ {path}$(.*?)(?=^##|\Z)", page, re.MULTILINE | re.DOTALL)
        assert part is not None, path
        for param in command.params:
            if param.param_type_name == "option" and param.name != "help":
                assert f"`{param.opts[0]}" in part[1], (path, param.opts)


def verbs(command: Any, path: str) -> list[tuple[str, Any]]:
    """Every verb below a command, by how it is called."""
    if not hasattr(command, "commands"):
        return [(path, command)]
    return [pair for name, inner in command.commands.items() for pair in verbs(inner, f"{path} {name}")]
