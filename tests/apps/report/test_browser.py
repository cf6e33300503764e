"""The page in Chromium, from disk: no request, no error, and everything that can be clicked works."""

from pathlib import Path
from typing import Any

import pytest

from mmssl.apps.report import write_report
from tests.helpers.browser import Watched

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def path(hostile_run: Path, second_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report([hostile_run, second_run], tmp_path_factory.mktemp("page"))[0]


SCREENS = [(390, 844, "light"), (390, 844, "dark"), (1600, 1000, "light"), (1600, 1000, "dark")]


@pytest.mark.parametrize(("width", "height", "scheme"), SCREENS)
def test_the_page_opens_without_a_request(browser: Any, path: Path, width: int, height: int, scheme: str) -> None:
    """On a phone and a wide screen, light and dark: no request, no error, no name that runs, nothing cut off."""
    watched = Watched(browser, path.as_uri(), width, height, scheme)
    watched.shoot(f"page-{width}-{scheme}")
    assert watched.page.evaluate("document.documentElement.scrollWidth") <= width
    assert watched.page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    watched.check()


def test_what_can_be_clicked_works(browser: Any, path: Path) -> None:
    """Tabs, scales, runs, the tip of a curve, a point of the map and folded parts, by mouse and by keyboard."""
    watched = Watched(browser, path.as_uri(), 1280, 900)
    page = watched.page
    tabs = page.get_by_role("tab")
    assert tabs.count() == 4
    for index in range(4):
        tabs.nth(index).click()
        assert tabs.nth(index).get_attribute("aria-selected") == "true"
        assert page.locator(".panel:visible").count() == 1
    tabs.nth(3).press("ArrowRight")
    assert tabs.nth(0).get_attribute("aria-selected") == "true"

    plot = page.locator("[data-chart='contrastive.loss'] .plot")
    before = plot.locator("path").last.get_attribute("d")
    page.get_by_label("logarithmic scale").check()
    assert plot.locator("path").last.get_attribute("d") != before
    lines = plot.locator("path").count()
    page.get_by_label("second", exact=False).first.uncheck()
    assert plot.locator("path").count() < lines
    plot.hover()
    assert "hostile:" in plot.locator(".tip").inner_text()
    plot.press("ArrowLeft")
    assert "step" in plot.locator(".tip").inner_text()

    space = page.locator(".space:visible").first
    space.locator(".field span").first.hover(force=True)
    said = space.locator(".says").inner_text()
    assert said != "Point at an image."
    assert "px" in str(space.locator(".thumb").evaluate("node => node.style.backgroundPosition"))
    space.locator(".field").press("ArrowRight")
    page.locator(".as-images:visible").uncheck()
    assert space.locator(".field span").count() == 0
    assert space.locator(".field circle, .field rect").count() == 48
    for summary in page.locator("summary:visible").all():
        summary.click()
    page.get_by_role("link", name="Repeat it").click()
    watched.shoot("page-clicked")
    watched.check()


def test_it_can_be_used_by_keyboard(browser: Any, path: Path) -> None:
    """The tab key reaches the link past the navigation first, and what has the focus is always in sight."""
    watched = Watched(browser, path.as_uri(), 1280, 900)
    page = watched.page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    for _ in range(25):
        page.keyboard.press("Tab")
        box = page.evaluate("document.activeElement.getBoundingClientRect().toJSON()")
        assert box["bottom"] > 0
        assert box["top"] < 900
    watched.check()
