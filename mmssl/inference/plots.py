"""An image with the probabilities of its labels, drawn."""

import textwrap
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from mmssl.data.transforms import decoding
from mmssl.inference.model import ImageInput
from mmssl.plotting import BLUE, drawing, hide_spines

SHOWN = 5
"""Labels that are drawn."""
_OTHERS = "#94a3b8"


def draw_prediction(path: Path, image: ImageInput, probabilities: Mapping[str, float]) -> None:
    """Write a PNG: the image, and beside it a bar for each of the most probable labels.

    Args:
        probabilities: label -> probability, the highest first.
    """
    shown = list(islice(probabilities.items(), SHOWN))
    names = [textwrap.shorten(label, 32, placeholder=" …") for label, _ in shown]
    heights = [value for _, value in shown]
    with drawing(path, 8, 3.6) as canvas:
        left, bars = canvas.subplots(1, 2, width_ratios=[1, 1.2])
        left.imshow(pixels_of(image))
        left.set_axis_off()
        bars.barh(range(len(shown)), heights, color=[BLUE, *[_OTHERS] * (len(shown) - 1)])
        bars.set_yticks(range(len(shown)), names, fontsize=10, parse_math=False)
        for place, value in enumerate(heights):
            bars.text(min(value, 0.84) + 0.01, place, f"{value:.1%}", va="center", fontsize=9)
        bars.set_xlim(0, 1)
        bars.invert_yaxis()
        bars.xaxis.set_visible(False)
        hide_spines(bars)


def pixels_of(image: ImageInput) -> npt.NDArray[np.uint8]:
    """RGB pixels [H, W, 3] of anything that is an image.

    Raises:
        DecodeError: it cannot be decoded.
        OSError: the file cannot be read.
    """
    if isinstance(image, str | Path):
        image = Path(image).read_bytes()
    if isinstance(image, bytes):
        return decoding.decode(image)
    if isinstance(image, Tensor):
        return image.permute(1, 2, 0).cpu().numpy()
    return decoding.rgb_pixels(image) if isinstance(image, Image.Image) else image
