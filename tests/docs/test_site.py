"""The site is built without a warning, and asks nothing of other hosts."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

from tests.helpers.docs_blocks import ROOT

FETCHED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "audio": "src"}
"""Elements for which a browser fetches what an attribute names; and `link`, by its kind."""


class Fetches(HTMLParser):
    """What a browser fetches to show a page, and where the page's links lead."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep the addresses of an element."""
        given = dict(attrs)
        if tag in FETCHED:
            self.fetched.append(given.get(FETCHED[tag]) or "")
        if tag == "link" and given.get("rel") not in ("next", "prev", "canonical"):
            self.fetched.append(given.get("href") or "")
        if tag == "a":
            self.links.append(given.get("href") or "")


def read(page: Path) -> Fetches:
    parsed = Fetches()
    parsed.feed(page.read_text(encoding="utf-8"))
    return parsed


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    """No page and no style sheet names a file of another host, and no page has a diagram, for which the theme's script
    would fetch a library. A test with a browser watches the rest."""
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        assert [a for a in read(page).fetched if re.match(r"(https?:)?//", a)] == [], page.name
        assert "mermaid" not in page.read_text(encoding="utf-8")
    for sheet in site.rglob("*.css"):
        assert re.findall(r"(?:url\(|@import)\s*['\"]?(?:https?:)?//", sheet.read_text(encoding="utf-8")) == []


def test_links_lead_to_pages_that_exist(site: Path) -> None:
    """Also those that leave docs/ in the repository, and those of the README within the first page."""
    for page in site.rglob("*.html"):
        for link in read(page).links:
            target = link.partition("#")[0]
            if target and not re.match(r"\w+:", target) and page.name != "404.html":
                assert (page.parent / target).exists(), f"{page.relative_to(site)}: {link}"


def test_the_reference_stands_in_the_site(site: Path) -> None:
    """What is generated, and what is read from docstrings, is on its page."""
    for page, words in {
        "reference/configuration.html": ["data.shuffle_block", "objectives.mlm.mask_ratio"],
        "reference/command-line.html": ["mmssl shards pack", "--push-to-hub"],
        "reference/python.html": ["encode_image", "exact_nearest", "UserError"],
        "index.html": ["Quick start", "quickstart-examples.png"],
        "contributing.html": ["Front doors", "custom_objective"],
    }.items():
        text = (site / page).read_text(encoding="utf-8")
        assert [word for word in words if word not in text] == []


def test_the_search_finds_explanations_and_no_source_files(site: Path) -> None:
    """Pages of files that docs link to are not in its index; every page of the navigation is."""
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    found = {entry["location"].partition("#")[0] for entry in index["docs"]}
    pages = {page.relative_to(site).as_posix() for page in site.rglob("*.html")} - {"404.html"}
    assert found == {page for page in pages if not page.startswith("files/")}


def test_links_work_in_the_repository_too() -> None:
    """Every relative link of README and docs names a file that exists."""
    for page in [
        *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")),
        *(ROOT / "docs").rglob("*.md"),
    ]:
        text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        for target in re.findall(r"\]\((?!\w+:|#)([^)\s#]+)", text):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
