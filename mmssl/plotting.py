"""White sheets with small images, bars and words, saved as PNG. Drawn without a display.

How much room text takes: letters of some scripts are two columns wide.
"""

import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unicodedata import combining, east_asian_width

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.patches import Rectangle

from mmssl.data.transforms.decode import Pixels

GREEN, RED, GRAY = "#1a7f37", "#c93c37", "#d0d7de"
FONTS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "Source Han Sans SC", "WenQuanYi Zen Hei"),
    *("PingFang SC", "Hiragino Sans", "Microsoft YaHei", "Malgun Gothic"),
    *("Noto Sans Arabic", "Noto Sans Hebrew", "Noto Sans Devanagari", "Noto Sans Bengali", "Noto Sans Tamil"),
    *("Noto Sans Thai", "Arial Unicode MS", "Noto Emoji"),
)
"""Where letters are taken from that matplotlib's own font lacks, if installed."""


@dataclass
class Page:
    """A white sheet measured in inches from the upper left corner."""

    axes: Axes

    def image(self, x: float, y: float, side: float, pixels: Pixels | None, frame: str = GRAY) -> None:
        """An image fitted into a square with a coloured frame; without an image, the empty square."""
        if pixels is not None:
            height, width = (side * 0.94 * n / max(pixels.shape[:2]) for n in pixels.shape[:2])
            left, top = x + (side - width) / 2, y + (side - height) / 2
            extent = (left, left + width, top + height, top)
            self.axes.imshow(pixels, extent=extent, aspect="auto", interpolation="lanczos")
        else:
            self.text(x + side / 2, y + side / 2, "no image", ha="center", color="#8c959f")
        self.axes.add_patch(Rectangle((x, y), side, side, fill=False, edgecolor=frame, linewidth=2))

    def bar(self, x: float, y: float, width: float, height: float, color: str) -> None:
        """A filled rectangle."""
        self.axes.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor="none"))

    def text(self, x: float, y: float, text: str, **style: Any) -> None:
        """Text as it stands (a dollar sign starts no formula), by default its left middle at (x, y)."""
        usual: dict[str, Any] = {"parse_math": False, "fontsize": 9, "va": "center"}
        self.axes.text(x, y, text, **(usual | style))


@contextmanager
def sheet(path: Path, width: float, height: float, title: str) -> Iterator[Page]:
    """A page of so many inches that is saved as PNG on leaving."""
    figure = Figure(figsize=(width, height), dpi=110, facecolor="white")
    page = Page(figure.add_axes((0, 0, 1, 1)))
    with lettering():
        yield page
        page.text(width / 2, 0.1, title, fontsize=12, ha="center", va="top")
        page.axes.set(xlim=(0, width), ylim=(height, 0))
        page.axes.axis("off")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


@contextmanager
def lettering() -> Iterator[None]:
    """While entered, text is drawn in as many scripts as fonts are installed for; other letters become boxes."""
    installed = {font.name for font in fontManager.ttflist}
    families = ["sans-serif", *(name for name in FONTS if name in installed)]
    with rc_context({"font.family": families}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def columns(text: str) -> int:
    """The width of a text in letters of Latin: wide letters take two, marks upon letters none."""
    return sum(0 if combining(letter) else 2 if east_asian_width(letter) in "WF" else 1 for letter in text)


def wrapped(text: str, width: int, lines: int) -> str:
    """A text in at most so many lines of at most so many columns, its rest left out, if need be within a word."""
    letters = width if columns(text) <= len(text) else width // 2
    found = textwrap.wrap(text[: 4 * letters * lines], letters) or [""]
    if len(found) > lines:
        last = found[lines - 1]
        found[lines - 1] = f"{last} …" if len(last) + 2 <= letters else f"{last[: letters - 1]}…"
    return "\n".join(found[:lines])
