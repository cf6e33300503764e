"""JPEGs that cost a decoder what photographs cost it: seeded, made here, in shards."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from mmssl.data.transforms import Pixels
from mmssl.rng import generator

QUALITY = 90
"""Of the JPEGs: libraries save with 75 to 95 by default."""
_SCENES = 8
_SHAPES = ((1, 1), (4, 3), (3, 2), (3, 4), (2, 3))
"""Width to height, as cameras make them."""
_CONTRAST = np.array([45.0, 14.0, 14.0])
"""Standard deviations of luma and of both chromas, of 255."""
_FALL = 1.5
"""Amplitudes fall as 1 / frequency to this power: natural images have about 1 (Field 1987) in few places and much
less in most. With 1.5 everywhere the images have the bits and the decoding time of photographs: 1.9 bits a pixel at
512 px; four photographs of scikit-image have 1.5 to 2.4 at this quality."""
_GRAIN = 1.0
_WORDS = (
    "a",
    "the",
    "photo",
    "of",
    "old",
    "small",
    "red",
    "dog",
    "cat",
    "street",
    "house",
    "tree",
    "under",
    "sky",
    "hill",
)

Floats = NDArray[np.float32]


def write_shards(
    folder: Path, side: int, samples: int, shards: int = 4, distinct: int = 256, seed: int = 0, quality: int = QUALITY
) -> list[str]:
    """Write `samples` pairs, of which `distinct` images are different, the shorter side of each `side` pixels.

    Returns the shards' paths.
    """
    folder.mkdir(parents=True, exist_ok=True)
    images = list(photographs(side, min(distinct, samples), seed, quality))
    rng, paths = generator(seed, "captions"), []
    for shard in range(shards):
        path = folder / f"{shard:05}.tar"
        with tarfile.open(path, "w") as tar:
            for number in range(samples * shard // shards, samples * (shard + 1) // shards):
                caption = " ".join(rng.choice(_WORDS, size=int(rng.integers(5, 20))))
                for extension, content in (("jpg", images[number % len(images)]), ("txt", caption.encode())):
                    info = tarfile.TarInfo(f"{number:07}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        paths.append(str(path))
    return paths


def photographs(side: int, count: int, seed: int = 0, quality: int = QUALITY) -> Iterator[bytes]:
    """JPEGs of several shapes: two scenes that meet at a sharp edge, and a sensor's grain.

    A scene is noise whose amplitudes fall with frequency, which decides how many coefficients a decoder meets.
    """
    rng = generator(seed, "photographs", side)
    longest = -(-side * 3 // 2)
    scenes = [_scene(rng, longest) for _ in range(_SCENES)]
    for _ in range(count):
        across, down = _SHAPES[int(rng.integers(len(_SHAPES)))]
        width, height = (side * part // min(across, down) for part in (across, down))
        first, second = (_part(scenes[int(i)], rng, height, width) for i in rng.choice(_SCENES, 2, replace=False))
        slope, offset = rng.normal(size=2)
        columns, rows = np.linspace(-1, 1, width), np.linspace(-1, 1, height)[:, None]
        image = np.where((slope * columns + rows > offset / 2)[:, :, None], first, second)
        image = image + rng.normal(0, _GRAIN, (height, width, 1))
        pixels: Pixels = np.clip(image, 0, 255).astype(np.uint8)
        yield simplejpeg.encode_jpeg(pixels, quality=quality, colorspace="RGB", colorsubsampling="420")


def _scene(rng: np.random.Generator, side: int) -> Floats:
    """float32 [side, side, 3], about 0 to 255."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side))
    frequency[0, 0] = np.inf
    planes = []
    for contrast in _CONTRAST:
        spectrum = np.fft.rfft2(rng.normal(size=(side, side))) / frequency**_FALL
        plane = np.fft.irfft2(spectrum, s=(side, side))
        planes.append(plane * (contrast / plane.std()))
    luma, blue, red = planes
    # ITU-R BT.601, as JPEG uses it.
    colours = [luma + 1.402 * red, luma - 0.344 * blue - 0.714 * red, luma + 1.772 * blue]
    return (np.stack(colours, axis=-1) + 118).astype(np.float32)


def _part(scene: Floats, rng: np.random.Generator, height: int, width: int) -> Floats:
    top, left = (int(rng.integers(scene.shape[0] - length + 1)) for length in (height, width))
    part = scene[top : top + height, left : left + width]
    return part[:, ::-1] if rng.random() < 0.5 else part
