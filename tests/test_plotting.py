"""Names in any script: how wide they are, and that they are drawn."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.font_manager import FontEntry, fontManager
from PIL import Image

from mmssl.plotting import columns, sheet, text_fonts, wrapped


@pytest.mark.parametrize(("text", "width"), [("cat", 3), ("写真", 4), ("cafe\u0301s", 5), ("ねこ cat", 8), ("", 0)])
def test_wide_letters_take_two_columns(text: str, width: int) -> None:
    """Chinese, Japanese and Korean letters are as wide as two of Latin; accents of their own take none."""
    assert columns(text) == width


def test_lines_are_no_wider_than_allowed() -> None:
    """Words are kept whole where they fit; of what does not fit the beginning stands, with a mark; no text is an empty
    line."""
    assert wrapped("a red square", 7, 2) == "a red\nsquare"
    assert wrapped("a red square and more", 7, 2) == "a red\nsquare…"
    assert wrapped("a red and more", 8, 1) == "a red …"
    assert wrapped("W" * 300 + " a", 24, 1) == "W" * 23 + "…"
    assert max(columns(line) for line in wrapped("写真" * 40, 20, 3).splitlines()) <= 20
    assert max(map(len, wrapped("x" * 500, 24, 2).splitlines())) <= 24
    assert wrapped("", 24, 1) == ""


def test_installed_fonts_lend_their_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    """A font that matplotlib finds is asked for letters that its own lacks; one that is not there is not."""
    import matplotlib

    before = list(matplotlib.rcParams["font.family"])
    entries = [*fontManager.ttflist, FontEntry(name="Noto Sans CJK JP")]
    monkeypatch.setattr(fontManager, "ttflist", entries)
    with text_fonts():
        assert matplotlib.rcParams["font.family"][0] == "sans-serif"
        assert "Noto Sans CJK JP" in matplotlib.rcParams["font.family"]
        assert "Malgun Gothic" not in matplotlib.rcParams["font.family"]
    assert matplotlib.rcParams["font.family"] == before


@pytest.mark.parametrize("title", ["letters: " + "w" * 300, "x" * 80 + "\nshort", "日本語" * 60, "two words"])
def test_a_title_is_never_cut_by_the_edge(title: str, tmp_path: Path) -> None:
    """However long, a title leaves a margin of white at both sides of its page."""
    with sheet(tmp_path / "page.png", 5, 1, title):
        pass
    dark = np.asarray(Image.open(tmp_path / "page.png").convert("L")) < 128
    assert dark.any()
    assert not dark[:, :4].any()
    assert not dark[:, -4:].any()
