"""Encoded images to model inputs: random views for training, a fixed view for evaluation."""

import math
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mmssl.config import ViewConfig
from mmssl.data.transforms.augment import augment, has_augmentations
from mmssl.data.transforms.augment_params import AugmentParams, between, between_log, draw_params, from_rows, to_rows
from mmssl.data.transforms.caps import DecodeError
from mmssl.data.transforms.decoding import (
    MAX_PIXELS,
    REDUCTIONS,
    Header,
    Pixels,
    decode,
    pillow_pixels,
    read_header,
)

Interpolation = Literal["bicubic", "bilinear"]
DecodeMode = Literal["quality", "fast"]
"""`quality` stays within 1/255 of the full JPEG decode on average; `fast` decodes a JPEG at the smallest size that
leaves at least 3/4 of the output's side."""

_FAST_MARGIN = 0.75
_QUALITY_MARGIN = 2.0
_MAX_ASPECT_RATIO = 20
"""Longer images are cut to this aspect ratio before they are resized."""


class Crop(NamedTuple):
    """A rectangle of an image, in pixels of the full-size image."""

    top: int
    left: int
    height: int
    width: int

    def on_grid(self, reduce: int, header: Header) -> "Crop":
        """Move the edges to multiples of `reduce`, so that a reduced decode can be cropped exactly."""
        top, left = round(self.top / reduce), round(self.left / reduce)
        bottom = min(round((self.top + self.height) / reduce), header.height // reduce)
        right = min(round((self.left + self.width) / reduce), header.width // reduce)
        return Crop(top * reduce, left * reduce, (bottom - top) * reduce, (right - left) * reduce)


class View:
    """A random view of images for training: crop, resize, flip, then the other augmentations."""

    def __init__(
        self,
        config: ViewConfig,
        image_size: int,
        mode: DecodeMode = "quality",
        max_pixels: int = MAX_PIXELS,
        interpolation: Interpolation = "bicubic",
        like: str | None = None,
    ) -> None:
        """`like`: the view whose crop and augmentations it shares. Default: its own."""
        self.config = config
        self.image_size = image_size
        self.mode = mode
        self.max_pixels = max_pixels
        self.interpolation = interpolation
        self.like = like

    def __call__(self, image: bytes, rng: np.random.Generator) -> Tensor:
        """Render an encoded image to uint8 [3, image_size, image_size].

        Raises:
            DecodeError: the image is unusable.
        """
        header = read_header(image, self.max_pixels)
        params = draw_params(rng)
        crop = self.crop(header, params)
        return self.paint(decode(image, header, self.reduction(header, crop)), header, crop, params)

    def crop(self, header: Header, params: AugmentParams[float]) -> Crop:
        """The random resized crop of Inception (Szegedy et al. 2015).

        Ten pairs of area and aspect ratio are tried; if none fits, it is the largest centred crop of an allowed ratio.
        """
        width, height = header.width, header.height
        low, high = self.config.crop_ratio
        for u, v in zip(params.crop_area, params.crop_ratio, strict=True):
            area = width * height * between(self.config.crop_scale, u)
            ratio = between_log((low, high), v)
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return Crop(
                    int(params.crop_top * (height - h + 1)),
                    int(params.crop_left * (width - w + 1)),
                    h,
                    w,
                )
        w = max(1, min(width, round(height * high)))
        h = max(1, min(height, round(width / low)))
        return Crop((height - h) // 2, (width - w) // 2, h, w)

    def reduction(self, header: Header, crop: Crop) -> int:
        """The DCT reduction (1, 2, 4 or 8) at which the image may be decoded for this crop."""
        return dct_reduction(header, min(crop.height, crop.width) / self.image_size, self.mode)

    def paint(self, pixels: Pixels, header: Header, crop: Crop, params: AugmentParams[float] | None) -> Tensor:
        """Render decoded pixels, of full or reduced size, to uint8 [3, image_size, image_size].

        Without `params`, only crop and resize.
        """
        image = resize(_cut(pixels, header, crop), self.image_size, self.image_size, self.interpolation)
        if params is None or not has_augmentations(self.config):
            return image
        return augment(image[None], self.config, from_rows(to_rows([params])))[0]


class EvalView:
    """The fixed view of evaluation and inference."""

    def __init__(
        self,
        image_size: int,
        fit: Literal["shortest", "squash"] = "shortest",
        mode: DecodeMode = "quality",
        max_pixels: int = MAX_PIXELS,
        interpolation: Interpolation = "bicubic",
    ) -> None:
        """
        Args:
            fit: `shortest` resizes the shorter side to `image_size` and crops the centre, as OpenCLIP does; `squash`
                resizes both sides without cropping.
        """
        self.image_size = image_size
        self.fit = fit
        self.mode = mode
        self.max_pixels = max_pixels
        self.interpolation = interpolation

    def __call__(self, image: bytes | Image.Image | npt.NDArray[Any] | Tensor) -> Tensor:
        """Render to uint8 [3, image_size, image_size].

        Args:
            image: an encoded image, or one that `as_pixels` takes.

        Raises:
            DecodeError: the image is unusable, or an array or tensor has a wrong dtype, shape or range.
        """
        if isinstance(image, bytes):
            header = read_header(image, self.max_pixels)
            shrink = min(header.height, header.width) / self.image_size
            pixels = decode(image, header, dct_reduction(header, shrink, self.mode))
        else:
            pixels = as_pixels(image)
            header = Header("pixels", pixels.shape[1], pixels.shape[0])
        side = self.image_size
        if self.fit == "squash":
            return resize(pixels, side, side, self.interpolation)
        pixels = _middle(pixels)
        short = min(header.height, header.width)
        long = min(max(header.height, header.width), _MAX_ASPECT_RATIO * short)
        height, width = (int(side * min(length, long) / short) for length in (header.height, header.width))
        top, left = round((height - side) / 2), round((width - side) / 2)
        resized = resize(pixels, height, width, self.interpolation)
        return resized[:, top : top + side, left : left + side].contiguous()


def dct_reduction(header: Header, shrink: float, mode: DecodeMode) -> int:
    """The DCT reduction for a crop whose shorter side is `shrink` times the output's side.

    Fast mode takes the largest that leaves 3/4 of the output's side. Quality mode halves, and only where twice the
    output's side is left: on 60 drawings and 12 photographs the result then differed from a full decode by 0.2 and
    0.7 of 255 on average, and by at most 1.24 (a photograph of gravel). Quarters differed by up to 2.4 and are not
    used.
    """
    if not header.reducible:
        return 1
    if mode == "quality":
        return 2 if shrink >= 2 * _QUALITY_MARGIN else 1
    return next((factor for factor in REDUCTIONS if shrink >= factor * _FAST_MARGIN), 1)


def _middle(pixels: Pixels) -> Pixels:
    """The middle of an image beyond the largest aspect ratio.

    The centre crop drops the rest anyway, and a strip of 60,000 pixels would be enlarged to gigabytes.
    """
    most = _MAX_ASPECT_RATIO * min(pixels.shape[:2])
    top, left = (max(0, length - most) // 2 for length in pixels.shape[:2])
    return pixels[top : top + most, left : left + most]


def _cut(pixels: Pixels, header: Header, crop: Crop) -> Pixels:
    """Cut a crop, given in full-size pixels, out of pixels that may be decoded at a reduced size."""
    sizes = ((-(-header.height // factor), -(-header.width // factor)) for factor in (1, *reversed(REDUCTIONS)))
    reduce = 2 ** list(sizes).index(pixels.shape[:2])
    top, left, height, width = (length // reduce for length in crop.on_grid(reduce, header))
    return pixels[top : top + height, left : left + width]


def resize(pixels: Pixels, height: int, width: int, interpolation: Interpolation = "bicubic") -> Tensor:
    """Resize with antialiasing: uint8 [h, w, 3] -> uint8 [3, height, width]."""
    if min(pixels.strides) < 0 or not pixels.flags.writeable:  # unsupported by torch
        pixels = pixels.copy()
    # Crops stay strided: torch packs them faster than NumPy does.
    planes = torch.from_numpy(pixels).permute(2, 0, 1)
    if planes.shape[1:] != (height, width):
        planes = F.interpolate(planes[None], size=(height, width), mode=interpolation, antialias=True)[0]
    return planes.contiguous()


def shrink(image: bytes, header: Header, side: int) -> Pixels:
    """Decode an image and shrink it to the shorter side `side`, uint8 [height, width, 3].

    Raises:
        DecodeError: the image is unusable.
    """
    short = min(header.width, header.height)
    pixels = decode(image, header, dct_reduction(header, short / side, "quality"))
    height, width = (max(1, round(length * side / short)) for length in (header.height, header.width))
    return np.ascontiguousarray(resize(pixels, height, width).permute(1, 2, 0).numpy())


def empty_images(count: int, side: int) -> Tensor:
    """Uninitialised memory for images, uint8 [count, 3, side, side].

    NumPy allocates huge pages where Linux has them. Faulting in a batch of 256 takes 23 microseconds per image with
    huge pages and 61 with small ones.
    """
    return torch.from_numpy(np.empty((count, 3, side, side), dtype=np.uint8))


def as_pixels(image: Image.Image | npt.NDArray[Any] | Tensor) -> Pixels:
    """Upright RGB pixels, uint8 [H, W, 3], of an image that is decoded.

    Args:
        image: a Pillow image; an array [H, W, 3], [H, W, 1] or [H, W], or a tensor [3, H, W] or [1, H, W]: uint8, or
            floats from 0 to 1.

    Raises:
        DecodeError: the image is broken, or has another shape, type or range.
    """
    if isinstance(image, Image.Image):
        return pillow_pixels(image)
    if isinstance(image, Tensor):
        wanted = "a tensor [3, H, W]"
        array = image.detach().cpu().float().numpy() if image.is_floating_point() else image.detach().cpu().numpy()
        array = np.moveaxis(array, 0, -1) if array.ndim == 3 else array
    else:
        wanted = "an array [H, W, 3] or [H, W]"
        array = image[:, :, None] if image.ndim == 2 else image
    found = f"found {image.dtype} {list(image.shape)}"
    if array.ndim != 3 or array.shape[2] not in (1, 3) or 0 in array.shape:
        raise DecodeError(f"expected {wanted}, {found}")
    if np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 1):
            raise DecodeError(
                f"expected uint8 from 0 to 255, or floats from 0 to 1 before normalisation; {found} from {low:.4g} to "
                f"{high:.4g}"
            )
        array = np.rint(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise DecodeError(f"expected uint8 from 0 to 255, or floats from 0 to 1; {found}: convert it first")
    return np.repeat(array, 3, axis=2) if array.shape[2] == 1 else array
