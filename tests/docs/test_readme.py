"""The README stays short, plain and complete."""

import re

from tests.helpers.docs_blocks import PAGES, ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
WORDS = 750
SENTENCE = 17
"""Words of an average sentence."""
FENCE = re.compile(r"^```.*?^```$|^<!--[^\n]*-->$|^\|[^\n]*$|^!\[[^\n]*$", re.DOTALL | re.MULTILINE)
"""Blocks, comments, tables and images."""


def test_it_is_short() -> None:
    """At most so many words, code and tables included."""
    assert len(README.split()) <= WORDS


def test_its_sentences_are_short() -> None:
    """The mean over the sentences of paragraphs and lists; a link counts by its words."""
    prose = re.sub(r"\]\([^)]*\)", "]", FENCE.sub("", README))
    paragraphs = re.split(r"\n\n|\n- ", prose)
    sentences = [s for p in paragraphs if not p.startswith("#") for s in re.split(r"(?<=[.:;?])\s", p) if s.split()]
    lengths = [len(sentence.split()) for sentence in sentences]
    assert sum(lengths) / len(lengths) <= SENTENCE


def test_it_links_every_page() -> None:
    """Each page of docs/ but the site's own front page and the pointer to CONTRIBUTING.md."""
    linked = set(re.findall(r"\]\(([^)\s#]+)\)", README))
    pages = {page.relative_to(ROOT).as_posix() for page in PAGES} - {
        "README.md",
        "docs/index.md",
        "docs/contributing.md",
    }
    assert pages <= linked
