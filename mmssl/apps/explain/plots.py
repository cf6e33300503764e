"""Explanations as PNG files."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmssl.apps.explain.explanation import Explanation, Neighbour
from mmssl.apps.explain.maps import overlay
from mmssl.data.transforms import DecodeError, Pixels, decoding
from mmssl.plotting import BLUE, MUTED, ORANGE, drawing, hide_spines, shortened, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WORDS_SHOWN = 12


def draw_explanation(path: Path, found: Explanation, neighbours: Sequence[tuple[str, Sequence[Neighbour]]]) -> None:
    """Draw the image, its map and the scores of the words; below, a row of training pairs per list of neighbours.

    Raises:
        UserError: the file cannot be written.
    """
    rows = 1 + len(neighbours)
    heights = [3.2, *([2.6] * len(neighbours))]
    with drawing(path, 11, 3.6 + 2.6 * len(neighbours)) as canvas:
        parts: list[Any] = canvas.subfigures(rows, 1, squeeze=False, height_ratios=heights).ravel().tolist()
        _draw_maps(parts[0], found)
        for part, (title, pairs) in zip(parts[1:], neighbours, strict=True):
            part.suptitle(title, fontsize=9, color=MUTED)
            for axes, pair in zip(np.atleast_1d(part.subplots(1, max(1, len(pairs)))), pairs, strict=False):
                axes.imshow(_pixels(pair.image))
                caption = f"{wrapped(pair.caption, 20, 2)}\n{pair.similarity:.3f}"
                axes.set_xlabel(caption, fontsize=7.5, parse_math=False)
                axes.set(xticks=[], yticks=[])
                hide_spines(axes)


def _draw_maps(part: Any, found: Explanation) -> None:
    title = f"{shortened(found.caption, 90)}   (similarity {found.similarity:.3f})"
    part.suptitle(title, fontsize=11, parse_math=False)
    image, mapped, words = part.subplots(1, 3, width_ratios=[1, 1, 1.5])
    for axes, pixels, title in (
        (image, found.image, "the model's input"),
        (mapped, overlay(found.image, found.heat), f"places that match the caption ({found.method})"),
    ):
        axes.imshow(pixels.permute(1, 2, 0).numpy(), interpolation="nearest")
        axes.set_title(title, fontsize=9)
        axes.set_axis_off()
    _draw_words(words, found)


def _draw_words(axes: "Axes", found: Explanation) -> None:
    """Bars of the words from the first down; of a long caption, those with the largest scores."""
    kept = sorted(sorted(range(len(found.words)), key=lambda i: -abs(found.words[i][1]))[:WORDS_SHOWN])
    names, values = [found.words[i][0] for i in kept], [found.words[i][1] for i in kept]
    axes.barh(range(len(kept)), values, color=[ORANGE if value > 0 else BLUE for value in values])
    labels = [shortened(name.rstrip(",:;."), 24) for name in names]
    axes.set_yticks(range(len(kept)), labels, fontsize=9, parse_math=False)
    axes.invert_yaxis()
    axes.axvline(0, color=MUTED, linewidth=0.8)
    axes.set_title("decrease of the similarity without the word", fontsize=9)
    axes.tick_params(axis="x", labelsize=8)
    hide_spines(axes, "top", "right", "left")


def _pixels(image: bytes) -> Pixels:
    """An image of the shards; a gray pixel in place of a broken one."""
    try:
        return decoding.decode(image)
    except DecodeError:
        return np.full((1, 1, 3), 208, np.uint8)
