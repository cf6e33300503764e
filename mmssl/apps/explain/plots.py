"""Explanations as PNG files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mmssl.apps.explain.explanation import Explanation, overlay
from mmssl.apps.explain.neighbours import Neighbour
from mmssl.data.transforms import DecodeError, Pixels, decoding
from mmssl.plotting import text_fonts, wrapped
from scripts.bench.explain import CONTRAST, RANDOM, Sanity

ORANGE, BLUE, GRAY = "#c2410c", "#1d4ed8", "#57606a"
WORDS_SHOWN = 12


@text_fonts()
def draw_explanation(path: Path, found: Explanation, neighbours: Sequence[tuple[str, Sequence[Neighbour]]]) -> None:
    """The image, its map and the words' scores; below, a row of training pairs for each list of neighbours."""
    rows = 1 + len(neighbours)
    figure = Figure(figsize=(11, 3.6 + 2.6 * len(neighbours)), dpi=110, facecolor="white", layout="constrained")
    heights = [3.2, *([2.6] * len(neighbours))]
    parts: list[Any] = figure.subfigures(rows, 1, squeeze=False, height_ratios=heights).ravel().tolist()
    seen, mapped, words = parts[0].subplots(1, 3, width_ratios=[1, 1, 1.5])
    for axes, pixels, title in (
        (seen, found.image, "what the model sees"),
        (mapped, overlay(found.image, found.heat), f"where it speaks for the caption ({found.method})"),
    ):
        axes.imshow(pixels.permute(1, 2, 0).numpy(), interpolation="nearest")
        axes.set_title(title, fontsize=9)
        axes.set_axis_off()
    _words(words, found)
    parts[0].suptitle(f"{_cut(found.caption, 90)}   (similarity {found.similarity:.3f})", fontsize=11, parse_math=False)
    for part, (title, pairs) in zip(parts[1:], neighbours, strict=True):
        part.suptitle(title, fontsize=9, color=GRAY)
        for axes, pair in zip(np.atleast_1d(part.subplots(1, max(1, len(pairs)))), pairs, strict=False):
            axes.imshow(_pixels(pair.image))
            axes.set_xlabel(f"{wrapped(pair.caption, 20, 2)}\n{pair.similarity:.3f}", fontsize=7.5, parse_math=False)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
    _save(figure, path)


def draw_sanity(path: Path, found: Sanity) -> None:
    """The deletion curves with their intervals."""
    figure = Figure(figsize=(8.2, 4.8), dpi=110, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    colors = iter(("#1d4ed8", "#7c3aed", "#0f766e", "#be185d", "#a16207"))
    for name, curve in found.curves.items():
        control = name in (RANDOM, CONTRAST)
        style: dict[str, Any] = {"color": GRAY, "linestyle": ":" if name == RANDOM else "--"}
        if not control:
            style = {"color": ORANGE if name == found.default else next(colors)}
        width = 2.4 if name == found.default else 1.5
        label = f"{name}{' (default)' if name == found.default else ''}: {curve.area:.3f}"
        axes.plot(found.fractions, curve.mean, linewidth=width, label=label, **style)
        axes.fill_between(found.fractions, curve.low, curve.high, color=style["color"], alpha=0.12, linewidth=0)
    axes.set_xlabel("share of the patches covered, the most relevant first")
    axes.set_ylabel("similarity of image and text, mean and 95 % interval")
    axes.set_title(f"Deletion curves of {found.images} images, {found.cells} x {found.cells} patches", fontsize=10)
    axes.legend(title="mean height (lower is better)", fontsize=8.5, title_fontsize=8.5, frameon=False)
    axes.grid(color="#eaeef2")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    _save(figure, path)


def _words(axes: Axes, found: Explanation) -> None:
    """The words as bars from the first down; of a long caption those that matter most."""
    kept = sorted(sorted(range(len(found.words)), key=lambda i: -abs(found.words[i][1]))[:WORDS_SHOWN])
    names, values = [found.words[i][0] for i in kept], [found.words[i][1] for i in kept]
    axes.barh(range(len(kept)), values, color=[ORANGE if value > 0 else BLUE for value in values])
    axes.set_yticks(range(len(kept)), [_cut(name.rstrip(",:;."), 24) for name in names], fontsize=9, parse_math=False)
    axes.invert_yaxis()
    axes.axvline(0, color=GRAY, linewidth=0.8)
    axes.set_title("how much the similarity falls without the word", fontsize=9)
    axes.tick_params(axis="x", labelsize=8)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _pixels(image: bytes) -> Pixels:
    """An image of the shards; a grey pixel in place of one that is broken."""
    try:
        return decoding.decode(image)
    except DecodeError:
        return np.full((1, 1, 3), 208, np.uint8)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
