"""An image with the probabilities of its labels, drawn."""

import textwrap
import warnings
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from mmssl.data.transforms.decode import decode, rgb_pixels
from mmssl.inference.model import ImageInput

SHOWN = 5
"""Labels that are drawn."""
_BLUE, _GRAY = "#1d4ed8", "#94a3b8"


def draw_prediction(path: Path, image: ImageInput, probabilities: Mapping[str, float]) -> None:
    """Write a PNG: the image, and beside it a bar for each of the most probable labels.

    Args:
        probabilities: label -> probability, the highest first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(8, 3.6), dpi=110, facecolor="white", layout="constrained")
    seen, bars = figure.subplots(1, 2, width_ratios=[1, 1.2])
    seen.imshow(pixels_of(image))
    seen.set_axis_off()
    shown = list(islice(probabilities.items(), SHOWN))
    heights = [value for _, value in shown]
    bars.barh(range(len(shown)), heights, color=[_BLUE, *[_GRAY] * (len(shown) - 1)])
    names = [textwrap.shorten(label, 32, placeholder=" …") for label, _ in shown]
    bars.set_yticks(range(len(shown)), names, fontsize=10, parse_math=False)
    for place, value in enumerate(heights):
        bars.text(min(value, 0.84) + 0.01, place, f"{value:.1%}", va="center", fontsize=9)
    bars.set_xlim(0, 1)
    bars.invert_yaxis()
    bars.xaxis.set_visible(False)
    bars.spines[:].set_visible(False)
    with warnings.catch_warnings():
        # Labels in scripts that the font lacks are drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(path)


def pixels_of(image: ImageInput) -> npt.NDArray[np.uint8]:
    """RGB pixels [H, W, 3] of anything that is an image.

    Raises:
        DecodeError: it cannot be decoded.
        OSError: the file cannot be read.
    """
    if isinstance(image, str | Path):
        image = Path(image).read_bytes()
    if isinstance(image, bytes):
        return decode(image)
    if isinstance(image, Tensor):
        return image.permute(1, 2, 0).cpu().numpy()
    return rgb_pixels(image) if isinstance(image, Image.Image) else image
