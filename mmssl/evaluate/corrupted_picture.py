"""A picture under every corruption, with what each costs."""

from pathlib import Path

import numpy as np
from PIL import Image

from mmssl.data.decode import Pixels
from mmssl.evaluate.corruptions import CORRUPTIONS, SEVERITIES, Robustness, corrupted
from mmssl.evaluate.sheet import GRAY, sheet
from mmssl.types import Sample

SIDE = 112


def draw(path: Path, name: str, shown: Sample, found: Robustness) -> None:
    """Rows: corruptions, columns: severities; under each cell the accuracy of all pictures, as number and bar.

    Args:
        shown: an uncompressed picture of the data set.
    """
    clean = found.metrics["acc1_clean"]
    title = (
        f"{name}: {100 * clean:.1f} % of {found.metrics['samples']:,} pictures right, "
        f"{100 * found.metrics['acc1_corrupted']:.1f} % when corrupted"
    )
    left, top, width, height = 2.3, 0.75, 1.25, 1.45
    with sheet(path, left + len(SEVERITIES) * width + 0.2, top + len(CORRUPTIONS) * height + 0.1, title) as page:
        for j, severity in enumerate(SEVERITIES):
            page.text(left + (j + 0.46) * width, 0.55, f"severity {severity}", ha="center", color="#57606a")
        for i, corruption in enumerate(CORRUPTIONS):
            y = top + i * height
            page.text(left - 0.15, y + 0.55, corruption.replace("_", " "), ha="right", weight="bold")
            share = f"{100 * float(found.accuracies[i].mean()):.1f} %"
            page.text(left - 0.15, y + 0.8, share, ha="right", color="#57606a")
            for j, severity in enumerate(SEVERITIES):
                x, accuracy = left + j * width, float(found.accuracies[i, j])
                page.picture(x, y, 1.13, _small(corrupted(shown.image, corruption, severity)))
                page.bar(x, y + 1.17, 1.13, 0.18, "#eef1f4")
                page.bar(x, y + 1.17, 1.13 * min(1.0, accuracy / clean if clean > 0 else 0.0), 0.18, GRAY)
                page.text(x + 0.565, y + 1.265, f"{100 * accuracy:.1f} %", ha="center", fontsize=8)


def _small(pixels: Pixels) -> Pixels:
    image = Image.fromarray(pixels)
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return np.asarray(image)
