"""The style of all plots: colours, fonts, saving, and white pages of images, bars and text. No display is needed.

matplotlib is imported when something is drawn. A plot is drawn inside `drawing` (axes) or `sheet` (a free page).
"""

import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unicodedata import category, combining, east_asian_width

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmssl.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Pixels = NDArray[np.uint8]
"""An RGB image, [H, W, 3]."""

GREEN, RED, BLUE, ORANGE = "#1a7f37", "#c93c37", "#1d4ed8", "#c2410c"
PURPLE, TEAL, PINK, BROWN = "#7c3aed", "#0f766e", "#be185d", "#a16207"
TEXT, MUTED, FAINT, GRAY, GRID = "#424a53", "#57606a", "#8c959f", "#d0d7de", "#eaeef2"
"""Grays, from dark to light."""
DPI = 110
FONTS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "Source Han Sans SC", "WenQuanYi Zen Hei"),
    *("PingFang SC", "Hiragino Sans", "Microsoft YaHei", "Malgun Gothic"),
    *("Noto Sans Arabic", "Noto Sans Hebrew", "Noto Sans Devanagari", "Noto Sans Bengali", "Noto Sans Tamil"),
    *("Noto Sans Thai", "Arial Unicode MS", "Noto Emoji"),
)
"""Fonts for scripts that matplotlib's own font lacks, used where they are installed."""


@contextmanager
def drawing(
    path: Path, width: float, height: float, *, dpi: int = DPI, font_size: float = 10, format: str | None = None
) -> "Iterator[Figure]":
    """A white matplotlib figure, in inches, that is saved on leaving.

    Args:
        format: for example `png`. None: from the suffix of the path.
    Raises:
        UserError: the file cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"font.size": font_size}), text_fonts():
        canvas = Figure(figsize=(width, height), dpi=dpi, facecolor="white", layout="constrained")
        yield canvas
        _save(canvas, path, format)


@contextmanager
def text_fonts() -> Iterator[None]:
    """Context in which text may use every script that an installed font covers; other letters become boxes."""
    from matplotlib import rc_context
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    families = ["sans-serif", *(name for name in FONTS if name in installed)]
    with rc_context({"font.family": families}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def font_for(text: str) -> str:
    """The file of the installed font that covers most letters of a text: matplotlib's own, if no other covers more."""
    return max(_font_files(), key=lambda path: len(_letters(text) & _charmap(path)))


def has_font(text: str) -> bool:
    """True if one installed font covers all letters of a text."""
    return _letters(text) <= _charmap(font_for(text))


def _letters(text: str) -> set[int]:
    return {ord(letter) for letter in text if category(letter) not in ("Cc", "Cf", "Cs") and not letter.isspace()}


@cache
def _font_files() -> list[str]:
    from matplotlib.font_manager import findfont, fontManager

    files = {font.name: font.fname for font in fontManager.ttflist}
    return [findfont("DejaVu Sans"), *(files[name] for name in FONTS if name in files)]


@cache
def _charmap(path: str) -> frozenset[int]:
    """Code points of a font's letters."""
    from matplotlib.font_manager import get_font

    return frozenset(get_font(path).get_charmap())


def hide_spines(axes: "Axes", *sides: str) -> None:
    """Remove the lines around a plot: all four, or those of the given sides."""
    for side in sides or ("top", "right", "bottom", "left"):
        axes.spines[side].set_visible(False)


@dataclass
class Page:
    """A white page measured in inches from the upper left corner."""

    axes: "Axes"

    def image(self, x: float, y: float, side: float, pixels: Pixels | None, frame: str = GRAY) -> None:
        """An image fitted into a square with a coloured frame; without an image, the empty square."""
        from matplotlib.patches import Rectangle

        if pixels is not None:
            height, width = (side * 0.94 * n / max(pixels.shape[:2]) for n in pixels.shape[:2])
            left, top = x + (side - width) / 2, y + (side - height) / 2
            extent = (left, left + width, top + height, top)
            self.axes.imshow(pixels, extent=extent, aspect="auto", interpolation="lanczos")
        else:
            self.text(x + side / 2, y + side / 2, "no image", ha="center", color=FAINT)
        self.axes.add_patch(Rectangle((x, y), side, side, fill=False, edgecolor=frame, linewidth=2))

    def bar(self, x: float, y: float, width: float, height: float, color: str) -> None:
        """A filled rectangle."""
        from matplotlib.patches import Rectangle

        self.axes.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor="none"))

    def text(self, x: float, y: float, text: str, **style: Any) -> None:
        """Plain text (a dollar sign starts no formula), by default with its left middle at (x, y)."""
        usual: dict[str, Any] = {"parse_math": False, "fontsize": 9, "va": "center"}
        self.axes.text(x, y, text, **(usual | style))


@contextmanager
def sheet(path: Path, width: float, height: float, title: str) -> Iterator[Page]:
    """A page, in inches, that is saved as PNG on leaving.

    Raises:
        UserError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    with text_fonts():
        canvas = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
        page = Page(canvas.add_axes((0, 0, 1, 1)))
        yield page
        _write_title(page, width, title)
        page.axes.set(xlim=(0, width), ylim=(height, 0))
        page.axes.axis("off")
        _save(canvas, path, "png")


def _write_title(page: Page, width: float, title: str) -> None:
    """A title of 12 points, smaller (down to 7) or cut where the page is too narrow for it."""
    drawn = page.axes.text(width / 2, 0.1, title, parse_math=False, fontsize=12, ha="center", va="top")
    room = 0.95 * width * DPI

    def excess() -> float:
        return float(drawn.get_window_extent().width) / room

    if excess() > 1:
        drawn.set_fontsize(max(7.0, 11.3 / excess()))  # below 12: letters of small sizes are rounded up to pixels
    if excess() > 1:
        lines = title.split("\n")
        most = int(max(map(len, lines)) / excess())
        drawn.set_text("\n".join(shortened(line, most) for line in lines))


def shrink(pixels: Pixels, side: int) -> Pixels:
    """An image whose longer side is at most `side` pixels."""
    small = Image.fromarray(pixels)
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    return np.asarray(small)


def columns(text: str) -> int:
    """The width of a text in Latin letters: wide letters take two, combining marks none."""
    return sum(0 if combining(letter) else 2 if east_asian_width(letter) in "WF" else 1 for letter in text)


def wrapped(text: str, width: int, lines: int) -> str:
    """A text in at most `lines` lines of `width` columns; the rest is cut, within a word if necessary."""
    letters = width if columns(text) <= len(text) else width // 2
    found = textwrap.wrap(text[: 4 * letters * lines], letters) or [""]
    if len(found) > lines:
        last = found[lines - 1]
        found[lines - 1] = f"{last} …" if len(last) + 2 <= letters else f"{last[: letters - 1]}…"
    return "\n".join(found[:lines])


def shortened(text: str, length: int) -> str:
    """A text of at most `length` letters, cut at the end."""
    return text if len(text) <= length else text[: length - 1] + "…"


def _save(canvas: "Figure", path: Path, format: str | None) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        canvas.savefig(path, format=format)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; name another folder") from None
