"""docs/architecture.md describes the package as it is."""

import re

from tests.helpers.docs_blocks import ROOT
from tests.test_structure import DATA_LAYERS, FOLDERS, LAYERS, PACKAGE

PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def test_every_folder_has_a_line_in_the_tree() -> None:
    """Each folder and no other, in the block below `mmssl/`."""
    block = re.search(r"^```\nmmssl/\n(.*?)^scripts/", PAGE, re.DOTALL | re.MULTILINE)
    assert block is not None
    named, above = set(), ""
    for indent, name in re.findall(r"^( +)(\w+)/\s", block[1], re.MULTILINE):
        above = name if len(indent) == 2 else above
        named.add(name if len(indent) == 2 else f"{above}/{name}")
    assert named == {folder.relative_to(PACKAGE).as_posix() for folder in FOLDERS} - {"."}


def test_the_layers_are_those_that_are_tested() -> None:
    """The lines of arrows name the entries of the tables in the same order."""
    block = re.search(r"^```\n(types .*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    assert block is not None
    package, _, data = block[1].partition("in data/:")
    for text, table in ((package, LAYERS), (data, DATA_LAYERS)):
        layers = [set(layer.split()) for layer in text.split("->")]
        assert layers == [set(layer) for layer in table if layer != ("__init__",)]


def test_every_file_named_exists() -> None:
    """Paths of the package in the text."""
    for path in re.findall(r"`(mmssl/[\w/.]+)`", PAGE):
        assert (ROOT / path).exists(), path
