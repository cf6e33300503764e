"""The images that were found, drawn with their captions and similarities."""

import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mmssl.apps.search.index import Hit
from mmssl.data import iter_samples
from mmssl.data.transforms import DecodeError, decoding

_COLUMNS = 5
_INCHES = 2.4


def read_images(hits: Sequence[Hit]) -> list[bytes | None]:
    """The encoded image of each hit, read from its shard; None where it is no longer there."""
    wanted: dict[str, set[str]] = {}
    for hit in hits:
        wanted.setdefault(hit.shard, set()).add(hit.key)
    found: dict[tuple[str, str], bytes] = {}
    for shard, keys in wanted.items():
        for sample in iter_samples([shard], need_text=False, on_bad=lambda bad: None):
            if sample.key in keys:
                found[shard, sample.key] = sample.image
                keys.discard(sample.key)
            if not keys:
                break
    return [found.get((hit.shard, hit.key)) for hit in hits]


def draw_hits(path: Path, query: str, hits: Sequence[Hit], images: Sequence[bytes | None]) -> None:
    """Write a PNG: the nearest images in rows, the nearest first."""
    columns = min(_COLUMNS, max(1, len(hits)))
    rows = -(-len(hits) // columns)
    with matplotlib.rc_context({"font.size": 8}):
        figure = Figure(figsize=(columns * _INCHES, rows * (_INCHES + 0.6) + 0.4), layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(textwrap.shorten(query, 100), fontsize=11, parse_math=False)
        for place, (hit, image) in enumerate(zip(hits, images, strict=True)):
            axes = figure.add_subplot(rows, columns, place + 1)
            axes.set_axis_off()
            axes.set_anchor("N")  # images of a row begin at one height, and their titles end there
            if image is not None:
                try:
                    axes.imshow(decoding.decode(image))
                except DecodeError as error:
                    reason = textwrap.fill(str(error), 24)
                    axes.text(0.5, 0.5, reason, ha="center", va="center", parse_math=False)
            words = textwrap.shorten(hit.caption or hit.key, 64)
            axes.set_title(f"{hit.similarity:.3f}\n{textwrap.fill(words, 32)}", parse_math=False)
        with warnings.catch_warnings():
            # Captions in scripts that the font lacks are drawn as boxes.
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            figure.savefig(path, format="png")
