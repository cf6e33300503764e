"""A browser for the tests of pages."""

import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ARTEFACTS = Path(__file__).parents[2] / "build" / "browser"
"""Where the screenshots are kept."""
PROGRAMS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium, through playwright."""
    program = os.environ.get("CHROMIUM") or next((path for name in PROGRAMS if (path := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"no Chromium: none of {', '.join(PROGRAMS)} is on the path; install it, or set CHROMIUM")
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("no playwright: pip install 'mmssl[browser]'")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield started
        started.close()


class Watched:
    """A page and all it asked for and complained of."""

    def __init__(self, browser: Any, url: str, width: int, height: int, scheme: str = "light") -> None:
        # Without motion a click has its effect at once.
        self.context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, reduced_motion="reduce"
        )
        self.page = self.context.new_page()
        self.asked: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("console", lambda message: self.errors.append(message.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(url)
        self.own = url

    def check(self, also: str | None = None) -> None:
        """Nothing but the page itself, and what begins with `also`, was asked for; nothing was logged, and no name from
        the data ran."""
        own = [url for url in self.asked if url == self.own or url.startswith(("data:", "blob:", also or self.own))]
        assert own == self.asked
        assert self.errors == []
        assert self.page.evaluate("window.hacked") is None

    def shoot(self, name: str) -> None:
        """Keep a screenshot of the whole page."""
        ARTEFACTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=ARTEFACTS / f"{name}.png", full_page=True)
