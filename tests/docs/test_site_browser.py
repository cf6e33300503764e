"""The site in Chromium: it can be read and searched, and asks nothing of other hosts."""

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.helpers.browser import Watched

pytestmark = pytest.mark.browser


class Quiet(SimpleHTTPRequestHandler):
    """Serves a folder without a log."""

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """The site on loopback."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(("width", "name"), [(390, "site-phone"), (1600, "site")])
def test_pages_are_read_and_searched(browser: Any, address: str, width: int, name: str) -> None:
    """A page opens, a key of the configuration is found in the reference though it stands there behind its section, no
    source file is among the results, and every request stays on this host."""
    watched = Watched(browser, f"{address}index.html", width, 1000)
    watched.page.get_by_role("link", name="a first model").first.click()
    watched.page.wait_for_url("**/quickstart.html")
    watched.shoot(name)
    watched.page.goto(f"{address}index.html")
    if width < 1000:
        watched.page.locator("label[for=__search]").first.click()
    # The theme listens to keys, not to what is filled in.
    watched.page.locator("input[name=query]").press_sequentially("shuffle_block")
    found = watched.page.locator(".md-search-result__link")
    found.first.wait_for(timeout=15_000, state="attached")
    pages = {urlsplit(link).path for link in found.evaluate_all("links => links.map(link => link.href)")}
    assert "/reference/configuration.html" in pages
    assert [page for page in pages if page.startswith("/files/")] == []
    watched.check(also=address)
