"""Pages of the site beyond the Markdown of docs/: generated from the code, and files that docs link to.

`hooks` of mkdocs.yml names this file. Pages are written so that their links work where Markdown is read in the
repository; a link that leaves docs/ leads to a page of the site that shows the file.
"""

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
MOVED = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
"""Files outside docs/ that have a page of their own."""

_LINK = re.compile(r"(?<=\]\()(?!\w+:|#|//)([^)\s#]+)(?=[)#])")
_FENCE = re.compile(r"^ *```.*?^ *```$", re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of files that docs link to, and of the files that those link to."""
    files.append(File.generated(config, "changelog.md", content=_text("CHANGELOG.md")))
    pages = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    sources = [*MOVED, *(page for page in pages if (ROOT / page).is_file())]
    known: set[str] = set()
    while sources:
        for path in _linked(sources.pop()):
            page = _uri(path)
            if page.startswith("files/") and page not in known:
                known.add(page)
                content = _shown(path)
                files.append(File.generated(config, page, content=content, inclusion=InclusionLevel.NOT_IN_NAV))
                if path.endswith(".md"):
                    sources.append(path)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in README.md, and turn links between files into links between pages."""
    uri = page.file.src_uri
    if uri.startswith("files/"):
        source = uri.removeprefix("files/")
        page.meta["search"] = {"exclude": True}  # what is searched for is explained on other pages
    else:
        source = "CHANGELOG.md" if uri == "changelog.md" else f"docs/{uri}"
    if uri == "contributing.md":
        source, markdown = "CONTRIBUTING.md", _text("CONTRIBUTING.md")
    markdown = relink(markdown, source, uri)
    if uri == "index.md":
        readme = relink(_text("README.md").partition("\n")[2], "README.md", uri)
        markdown = markdown.replace("<!-- README -->", readme)
    return markdown


def relink(markdown: str, source: str, page: str) -> str:
    """Links of a file of the repository, as links of a page of the site.

    Args:
        markdown: the file's text. Code blocks stay as they are.
        source: its path in the repository.
        page: the page's path in the site.
    """

    def site_link(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), found[1]))
        return posixpath.relpath(_uri(target), posixpath.dirname(page) or ".")

    done, end = [], 0
    for fence in _FENCE.finditer(markdown):
        done += [_LINK.sub(site_link, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*done, _LINK.sub(site_link, markdown[end:])])


def _linked(source: str) -> Iterator[str]:
    """Paths in the repository of the files that a Markdown file links to, which exist."""
    for target in _LINK.findall(_FENCE.sub("", _text(source))):
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if (ROOT / path).exists():
            yield path


def _uri(path: str) -> str:
    """Path in the site of a file of the repository."""
    if path in MOVED:
        return MOVED[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"files/{path}" if path.endswith(".md") else f"files/{path}.md"


def _shown(path: str) -> str:
    """A page that shows a file, or lists a folder."""
    place = ROOT / path
    if place.is_dir():
        names = sorted(child.name for child in place.iterdir() if child.is_file())
        blocks = [f"## {name}\n\n{_fenced(place / name)}" for name in names]
        return "\n\n".join([f"# {path}/", *blocks])
    return _text(path) if path.endswith(".md") else f"# {path}\n\n{_fenced(place)}"


def _fenced(path: Path) -> str:
    return f"```{path.suffix.removeprefix('.')}\n{path.read_text(encoding='utf-8').rstrip()}\n```"


def _text(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")
