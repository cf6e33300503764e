"""The page in Chromium: words, an image, labels and a map, on a wide screen and a phone."""

import io
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI
from PIL import Image

from mmssl.apps.search import Index, embed_shards
from mmssl.apps.serve import create_app
from mmssl.inference import Model, stored
from mmssl.rng import generator
from tests.helpers.browser import Watched
from tests.helpers.live_server import serving
from tests.helpers.toy_encoder import pack
from tests.helpers.uploads import image

pytestmark = pytest.mark.browser
HOSTILE = (
    "<script>window.hacked = 1</script>",
    '"><img src=x onerror="window.hacked = 2">',
    "' onmouseover='window.hacked = 3",
    "{{ 7 * 7 }} </li></ul>",
)


@pytest.fixture(scope="module")
def hostile_index(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Index:
    """Eight images whose captions try to break out of the page."""
    folder = tmp_path_factory.mktemp("hostile")
    with tarfile.open(folder / "0.tar", "w") as tar:
        for number in range(8):
            for extension, data in {"png": image(seed=number), "txt": HOSTILE[number % 4].encode()}.items():
                info = tarfile.TarInfo(f"{number}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    embed_shards(model, [str(folder / "0.tar")], folder / "i")
    return Index(folder / "i")


@pytest.fixture(scope="module")
def url(model: Model, hostile_index: Index) -> Iterator[str]:
    """The page under a prefix, as behind a proxy."""
    outer = FastAPI()
    outer.mount("/some/images", create_app(model, hostile_index))
    with serving(outer) as (port, _):
        yield f"http://127.0.0.1:{port}/some/images/"


@pytest.fixture
def upload(tmp_path: Path) -> Path:
    """An image to choose."""
    path = tmp_path / "mine.png"
    Image.new("RGB", (60, 40), "red").save(path)
    return path


LONG = (
    "Donaudampfschifffahrtsgesellschaftskapitänswitwe" * 9,
    "a sentence that does not end " * 40,
    "مرحبا بالعالم، هذه جملة طويلة بعض الشيء لاختبار اتجاه الكتابة",
    "日本語の長い説明文がここに続きますので改行が必要です" * 4,
    "e\u0301\u0323" * 60 + "👩‍👩‍👧‍👦" * 30,
    "",
)
"""Captions that are hard to set."""


@pytest.fixture(scope="module")
def many(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page over an index of 100,000 images with hard captions, keys and fields, most of them without a shard."""
    folder = tmp_path_factory.mktemp("many")
    records = [
        {"png": image(seed=n), "txt": LONG[n % 6], "json": {"style": f"größe {n % 3}", "x" * 200: "y" * 200}}
        for n in range(60)
    ]
    shard = str(pack(folder / ("long-name-" * 20 + ".tar"), records))
    embed_shards(model, [shard], folder / "i")
    record = stored.read_record(folder / "i")
    assert record is not None
    part = stored.read_part(stored.vectors(folder / "i", record.parts[0]), record)
    keys = [f"{'folder/' * 12}{n:06}" for n in range(10_000)]
    for number in range(1, 11):
        others = stored.rounded(generator("many", number).normal(size=(10_000, record.dim)).astype(np.float32), "int8")
        columns = {"shard": ["gone.tar"] * 10_000, "key": keys, "caption": [LONG[n % 6] for n in range(10_000)]}
        unit = stored.as_unit(others).astype(part.dtype)
        stored.write_part(folder / "i", number, unit, columns, {"style": [["rare"]] * 10_000})
    names = [shard, *(f"/nowhere/gone-{n}.tar" for n in range(10))]
    replace(record, shards=names, parts=list(range(11)), states=[None] * 11).write(folder / "i")
    with serving(create_app(model, Index(folder / "i"))) as (port, _):
        yield f"http://127.0.0.1:{port}/"


SCREENS = [(w, h, scheme) for w, h in ((390, 844), (1400, 900)) for scheme in ("light", "dark")]


@pytest.mark.parametrize(("width", "height", "scheme"), SCREENS)
def test_hard_texts_fit(browser: Any, many: str, width: int, height: int, scheme: str) -> None:
    """Among 100,000 images with long words, every script and no captions, nothing is wider than the screen or leaves
    its card; more hits come when asked for; conditions leave only images that meet them."""
    watched = Watched(browser, many, width, height, scheme)
    page = watched.page
    page.get_by_text("100,060 images").wait_for()
    page.get_by_label("What to look for").fill("a red square")
    page.get_by_role("button", name="Search").click()
    hits = page.locator("#hits li")
    page.get_by_role("heading", name="Images for “a red square”").wait_for()
    assert hits.count() == 24
    _check_layout(page, width)
    watched.shoot(f"serve-many-{width}-{scheme}")
    page.get_by_role("button", name="Show more").click()
    hits.nth(99).wait_for()
    assert hits.count() == 100
    assert page.get_by_role("button", name="Show more").is_hidden()
    page.get_by_text("Only some images").click()
    page.get_by_label("Those whose field meets a condition").fill("style=größe 1, key~1, style!=a, b")
    page.get_by_role("button", name="Search").click()
    page.get_by_role("heading", name="only style=größe 1, key~1, style!=a, b").wait_for()
    keys = [text.split(" in ")[0] for text in page.locator("#hits .place").all_text_contents()]
    assert 0 < len(keys) <= 20
    assert all("1" in key and int(key) % 3 == 1 for key in keys)
    page.locator("#hits img").first.evaluate("image => image.decode()")
    _check_layout(page, width)
    watched.shoot(f"serve-only-{width}-{scheme}")
    page.get_by_label("Those whose field meets a condition").fill("colour=red")
    page.get_by_role("button", name="Search").click()
    page.get_by_text("the index has no field 'colour'").wait_for()
    _check_layout(page, width)
    watched.shoot(f"serve-wrong-{width}-{scheme}")


def _check_layout(page: Any, width: int) -> None:
    """Nothing is wider than the screen; the parts of a card are inside it, and cards are not on top of each other."""
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    outside = """[...document.querySelectorAll('#hits li')].filter((card) => {
      const own = card.getBoundingClientRect();
      return [...card.querySelectorAll('*')].some((part) => {
        const { left, right, bottom } = part.getBoundingClientRect();
        return left < own.left - 1 || right > own.right + 1 || bottom > own.bottom + 1;
      });
    }).length"""
    assert page.evaluate(outside) == 0


@pytest.mark.parametrize(("width", "height", "scheme"), SCREENS)
def test_an_empty_index_is_said(
    browser: Any, model: Model, tmp_path: Path, width: int, height: int, scheme: str
) -> None:
    """Without images the page says so, and a search finds nothing, without an error."""
    embed_shards(model, [str(pack(tmp_path / "0.tar", []))], tmp_path / "i")
    with serving(create_app(model, Index(tmp_path / "i"))) as (port, _):
        url = f"http://127.0.0.1:{port}/"
        watched = Watched(browser, url, width, height, scheme)
        page = watched.page
        page.get_by_text("0 images").wait_for()
        page.get_by_label("What to look for").fill("a red square")
        page.get_by_role("button", name="Search").click()
        page.get_by_text("The index holds no images").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        watched.shoot(f"serve-empty-{width}-{scheme}")
        watched.check(also=url)


@pytest.mark.parametrize(
    ("width", "height", "scheme"), [(390, 844, "light"), (390, 844, "dark"), (1600, 1000, "light")]
)
def test_searching_and_classifying(browser: Any, url: str, upload: Path, width: int, height: int, scheme: str) -> None:
    """Words give hits with their images; a chosen image gives its likes, labels and a map. No request leaves the
    server, nothing is logged, no caption runs, and nothing is wider than the screen."""
    watched = Watched(browser, url, width, height, scheme)
    page = watched.page
    page.get_by_text("8 images").wait_for()
    page.get_by_label("What to look for").fill("a red <b>apple</b>")
    page.get_by_role("button", name="Search").click()
    page.get_by_role("heading", name="Images for “a red <b>apple</b>”").wait_for()
    hits = page.locator("#hits li")
    assert hits.count() == 8
    assert sorted({hits.nth(i).locator(".caption").inner_text() for i in range(8)}) == sorted(HOSTILE)
    page.locator("#hits img").first.evaluate("image => image.decode()")
    hits.nth(0).get_by_role("button").click()
    page.get_by_role("heading", name="Images like “").wait_for()
    assert hits.count() == 7

    page.locator("#file").set_input_files(upload)
    page.get_by_role("button", name="Find images like it").click()
    page.get_by_role("heading", name="Images like yours").wait_for()
    page.get_by_label("Which of these is it").fill("cat, dog\n<i>car</i>")
    page.get_by_role("button", name="Classify").click()
    guesses = page.locator("#guesses li")
    guesses.first.wait_for()
    assert guesses.count() == 3
    shares = [float(text.removesuffix(" %")) for text in page.locator("#guesses .p").all_inner_texts()]
    assert sum(shares) == pytest.approx(100, abs=0.2)
    page.get_by_label("Where in it is").fill("red square")
    page.get_by_role("button", name="Show", exact=True).click()
    page.locator("#overlay").wait_for()
    assert page.locator("#words li").count() == 2
    assert "strongest at the" in str(page.locator("#overlay").get_attribute("alt"))
    assert "Orange is where" in page.get_by_role("status").inner_text()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    watched.shoot(f"serve-{width}-{scheme}")
    watched.check(also=url)


def test_it_can_be_used_by_keyboard(browser: Any, url: str) -> None:
    """The tab key reaches the link past the head, the field, the button, the conditions and the choice of a file; Enter
    searches."""
    watched = Watched(browser, url, 1280, 900)
    page = watched.page
    page.get_by_text("8 images").wait_for()
    reached = []
    for _ in range(5):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
    assert reached == ["Skip to the content", "text", "Search", "Only some images", "file"]
    page.locator("#text").focus()
    page.keyboard.type("apple")
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="Images for “apple”").wait_for()
    named = "e => e.labels?.length || e.ariaLabel || e.textContent.trim() || e.hasAttribute('alt')"
    assert page.evaluate(f"[...document.querySelectorAll('input, textarea, button, img')].every({named})")
    watched.check(also=url)


def test_what_goes_wrong_is_said(browser: Any, url: str, tmp_path: Path) -> None:
    """A file that is no image, and one that is too large, are refused in words."""
    watched = Watched(browser, url, 1280, 900)
    page = watched.page
    page.get_by_text("8 images").wait_for()
    (tmp_path / "large.png").write_bytes(bytes(11 << 20))
    page.locator("#file").set_input_files(tmp_path / "large.png")
    page.get_by_text("large.png has 11.0 MiB; the server takes 10").wait_for()
    (tmp_path / "text.png").write_text("no image")
    page.locator("#file").set_input_files(tmp_path / "text.png")
    page.get_by_role("button", name="Find images like it").click()
    page.get_by_text("not a JPEG, PNG").wait_for()


def test_without_an_index_the_page_classifies_only(browser: Any, model: Model, upload: Path) -> None:
    """There is no search field; labels work."""
    with serving(create_app(model)) as (port, _):
        url = f"http://127.0.0.1:{port}/"
        watched = Watched(browser, url, 1280, 900)
        page = watched.page
        page.get_by_text("no index").wait_for()
        assert page.locator("#find").is_hidden()
        page.locator("#file").set_input_files(upload)
        assert page.locator("#similar").is_hidden()
        page.get_by_label("Which of these is it").fill("cat, dog")
        page.get_by_role("button", name="Classify").click()
        page.locator("#guesses li").first.wait_for()
        watched.check(also=url)
