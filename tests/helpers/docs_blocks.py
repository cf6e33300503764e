"""Code blocks of the documentation, and what a page says about how its blocks are tested.

A comment right before a block says what a test does with it; without one the block runs as it stands:

    <!-- test: skip because needs 8 GPUs -->                    it does not run; its commands are still checked
    <!-- test: slow -->                                         it runs with the slow tests only
    <!-- test: with train.steps=500 -> train.steps=2 -->        this text is replaced first; or `with a -> b, c -> d`
    <!-- test: save as own/shelf.py -->                         it does not run; it becomes this file

Several of these are joined by semicolons. CONTRIBUTING.md tells writers the same.
"""

import os
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = ("bash", "python", "yaml")
REASONS = r"needs (a GPU|\d+ GPUs|several machines|a network)\b.*|takes (a|\d+) (minute|hour)s?\b.*|runs until .*"
"""Why a block may be skipped: hardware, network, or length."""

_BLOCK = re.compile(
    r"^(?P<indent> *)```(?P<language>\w+)\n(?P<code>.*?)^(?P=indent)```$",
    re.DOTALL | re.MULTILINE,
)
_RULE = re.compile(r"<!-- test: (?P<rule>[^\n]*) -->\n\s*\Z")


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    page: Path
    line: int
    """Of its first line of code, from 1."""
    language: str
    code: str
    """As it stands on the page."""
    skip: str | None = None
    """Why it does not run."""
    slow: bool = False
    changes: tuple[tuple[str, str], ...] = ()
    """Texts and what is put in their place."""
    file: str | None = None
    """Path, relative to the page's folder, of the file that the reader saves it as."""

    @property
    def tested(self) -> str:
        """The code that runs: with the changes, and with /data, the readers' disk, as a folder beside the page.

        Raises:
            AssertionError: a text that is to be replaced does not occur.
        """
        code = self.code
        for old, new in self.changes:
            assert old in code, f"{self}: {old!r} does not occur in the block"
            code = code.replace(old, new)
        return code.replace("/data/", "data/")

    def __str__(self) -> str:
        return f"{os.path.relpath(self.page, ROOT)}:{self.line}"


def blocks(page: Path, *languages: str) -> list[Block]:
    """The blocks of a page in these languages, in order; of all LANGUAGES if none is named.

    Raises:
        ValueError: a rule cannot be read.
    """
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _BLOCK.finditer(text):
        if match["language"] in (languages or LANGUAGES):
            rule = _RULE.search(text, 0, match.start())
            line = text.count("\n", 0, match.start("code")) + 1
            block = Block(page, line, match["language"], textwrap.dedent(match["code"]))
            found.append(_ruled(block, rule["rule"]) if rule is not None else block)
    return found


def _ruled(block: Block, rule: str) -> Block:
    """The block with what its comment says."""
    skip, slow, changes, file = None, False, [], None
    for clause in rule.split("; "):
        if clause.startswith("skip because "):
            skip = clause.removeprefix("skip because ")
        elif clause == "slow":
            slow = True
        elif clause.startswith("save as "):
            file = clause.removeprefix("save as ")
        elif clause.startswith("with "):
            for pair in clause.removeprefix("with ").split(", "):
                old, arrow, new = pair.partition(" -> ")
                if not arrow:
                    raise ValueError(f"{block}: {pair!r} is not of the form OLD -> NEW")
                changes.append((old, new))
        else:
            raise ValueError(f"{block}: {clause!r} is none of `skip because`, `slow`, `save as` and `with`")
    return Block(block.page, block.line, block.language, block.code, skip, slow, tuple(changes), file)
