"""Encoded images to the squares a model sees: random renderings to train on, a fixed one to judge by."""

import math
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mmssl.config import ViewConfig
from mmssl.data.transforms.augment import augment, augments
from mmssl.data.transforms.augment_params import AugmentParams, between, between_log, draw_params, from_rows, to_rows
from mmssl.data.transforms.decode import MAX_PIXELS, REDUCTIONS, Header, Pixels, decode, read_header, rgb_pixels

Interpolation = Literal["bicubic", "bilinear"]
DecodeMode = Literal["quality", "fast"]
"""`quality` keeps a JPEG's pixels within 1/255 of the full decode on average; `fast` decodes it at the
smallest size that keeps 3/4 of the output's side, or more."""

_FAST_MARGIN = 0.75
_QUALITY_MARGIN = 2.0
_LONGEST = 20
"""Longer side over shorter side, up to which an image is resized whole before its middle is cut out."""


class Crop(NamedTuple):
    """A rectangle of an image, in pixels of its full size."""

    top: int
    left: int
    height: int
    width: int

    def on_grid(self, reduce: int, header: Header) -> "Crop":
        """The crop with its edges moved to multiples of `reduce`, where a reduced decode can cut exactly."""
        top, left = round(self.top / reduce), round(self.left / reduce)
        bottom = min(round((self.top + self.height) / reduce), header.height // reduce)
        right = min(round((self.left + self.width) / reduce), header.width // reduce)
        return Crop(top * reduce, left * reduce, (bottom - top) * reduce, (right - left) * reduce)


class View:
    """One named random rendering of images: crop, resize and flip, then changes of shape and colour."""

    def __init__(
        self,
        config: ViewConfig,
        image_size: int,
        mode: DecodeMode = "quality",
        max_pixels: int = MAX_PIXELS,
        interpolation: Interpolation = "bicubic",
    ) -> None:
        self.config = config
        self.image_size = image_size
        self.mode = mode
        self.max_pixels = max_pixels
        self.interpolation = interpolation

    def __call__(self, image: bytes, rng: np.random.Generator) -> Tensor:
        """Render an encoded image to uint8 [3, image_size, image_size].

        Raises:
            DecodeError: the image cannot be used.
        """
        header = read_header(image, self.max_pixels)
        augment_params = draw_params(rng)
        crop = self.crop(header, augment_params)
        return self.paint(decode(image, header, self.reduction(header, crop)), header, crop, augment_params)

    def crop(self, header: Header, augment_params: AugmentParams[float]) -> Crop:
        """The random resized crop of Inception (Szegedy et al. 2015).

        An area and a shape are tried ten times; else it is the greatest centred crop of an allowed shape.
        """
        width, height = header.width, header.height
        low, high = self.config.crop_ratio
        for u, v in zip(augment_params.crop_area, augment_params.crop_ratio, strict=True):
            area = width * height * between(self.config.crop_scale, u)
            ratio = between_log((low, high), v)
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return Crop(
                    int(augment_params.crop_top * (height - h + 1)),
                    int(augment_params.crop_left * (width - w + 1)),
                    h,
                    w,
                )
        w = max(1, min(width, round(height * high)))
        h = max(1, min(height, round(width / low)))
        return Crop((height - h) // 2, (width - w) // 2, h, w)

    def reduction(self, header: Header, crop: Crop) -> int:
        """The factor by which the image may be decoded smaller for this crop."""
        return dct_reduction(header, min(crop.height, crop.width) / self.image_size, self.mode)

    def paint(self, pixels: Pixels, header: Header, crop: Crop, augment_params: AugmentParams[float] | None) -> Tensor:
        """Render decoded pixels, of full or reduced size, to uint8 [3, image_size, image_size].

        Without `augment_params` it is only cut and resized.
        """
        image = resize(_cut(pixels, header, crop), self.image_size, self.image_size, self.interpolation)
        if augment_params is None or not augments(self.config):
            return image
        return augment(image[None], self.config, from_rows(to_rows([augment_params])))[0]


class EvalView:
    """The fixed rendering of evaluation and inference."""

    def __init__(
        self,
        image_size: int,
        fit: Literal["shortest", "squash"] = "shortest",
        mode: DecodeMode = "quality",
        max_pixels: int = MAX_PIXELS,
        interpolation: Interpolation = "bicubic",
    ) -> None:
        """`shortest` resizes the shorter side to `image_size` and cuts out the centre, as OpenCLIP does;
        `squash` resizes both sides and keeps everything."""
        self.image_size = image_size
        self.fit = fit
        self.mode = mode
        self.max_pixels = max_pixels
        self.interpolation = interpolation

    def __call__(self, image: bytes | Image.Image | Pixels | Tensor) -> Tensor:
        """Render to uint8 [3, image_size, image_size].

        Args:
            image: an encoded image, a Pillow image, a uint8 array [H, W, 3] or [H, W], or a uint8 tensor
                [3, H, W].

        Raises:
            DecodeError: an encoded image that cannot be used.
            ValueError: an array or tensor of another type or shape.
        """
        if isinstance(image, bytes):
            header = read_header(image, self.max_pixels)
            shrink = min(header.height, header.width) / self.image_size
            pixels = decode(image, header, dct_reduction(header, shrink, self.mode))
        else:
            pixels = _as_pixels(image)
            header = Header("pixels", pixels.shape[1], pixels.shape[0])
        side = self.image_size
        if self.fit == "squash":
            return resize(pixels, side, side, self.interpolation)
        pixels = _middle(pixels)
        short = min(header.height, header.width)
        long = min(max(header.height, header.width), _LONGEST * short)
        height, width = (int(side * min(length, long) / short) for length in (header.height, header.width))
        top, left = round((height - side) / 2), round((width - side) / 2)
        resized = resize(pixels, height, width, self.interpolation)
        return resized[:, top : top + side, left : left + side].contiguous()


def dct_reduction(header: Header, shrink: float, mode: DecodeMode) -> int:
    """The DCT reduction for a crop whose shorter side is `shrink` times the output's.

    Fast mode takes the greatest that leaves 3/4 of the output's side. Quality mode halves, and only where
    twice the output's side is left: over 60 drawings and 12 photographs the result then differed from that of
    a full decode by 0.2 and 0.7 of 255 on average, by 1.24 at most, on gravel. Quarters reach 2.4 on some
    drawings and are not used.
    """
    if not header.reducible:
        return 1
    if mode == "quality":
        return 2 if shrink >= 2 * _QUALITY_MARGIN else 1
    return next((factor for factor in REDUCTIONS if shrink >= factor * _FAST_MARGIN), 1)


def _middle(pixels: Pixels) -> Pixels:
    """The middle of an image that is longer than `_LONGEST` times its shorter side.

    Nobody sees the rest, and a line of 60,000 pixels would be enlarged to gigabytes."""
    most = _LONGEST * min(pixels.shape[:2])
    top, left = (max(0, length - most) // 2 for length in pixels.shape[:2])
    return pixels[top : top + most, left : left + most]


def _cut(pixels: Pixels, header: Header, crop: Crop) -> Pixels:
    """The crop, given at full size, out of pixels that may be decoded at a reduced size."""
    sizes = ((-(-header.height // factor), -(-header.width // factor)) for factor in (1, *reversed(REDUCTIONS)))
    reduce = 2 ** list(sizes).index(pixels.shape[:2])
    top, left, height, width = (length // reduce for length in crop.on_grid(reduce, header))
    return pixels[top : top + height, left : left + width]


def resize(pixels: Pixels, height: int, width: int, interpolation: Interpolation = "bicubic") -> Tensor:
    """With antialiasing, on bytes: uint8 [h, w, 3] -> uint8 [3, height, width]."""
    if min(pixels.strides) < 0:  # which torch does not take
        pixels = np.ascontiguousarray(pixels)
    # A crop goes as it lies: torch packs it faster than NumPy does.
    planes = torch.from_numpy(pixels).permute(2, 0, 1)
    if planes.shape[1:] != (height, width):
        planes = F.interpolate(planes[None], size=(height, width), mode=interpolation, antialias=True)[0]
    return planes.contiguous()


def empty_images(count: int, side: int) -> Tensor:
    """Memory for images, uint8 [count, 3, side, side].

    NumPy's, which comes in huge pages where Linux has them: fresh small ones for a batch of 256 take 61 microseconds a
    image, huge ones 23.
    """
    return torch.from_numpy(np.empty((count, 3, side, side), dtype=np.uint8))


def _as_pixels(image: Image.Image | Pixels | Tensor) -> Pixels:
    if isinstance(image, Image.Image):
        return rgb_pixels(image)
    if isinstance(image, Tensor):
        wanted = "a uint8 tensor [3, H, W]"
        array = image.movedim(0, -1).cpu().numpy()
    else:
        wanted = "a uint8 array [H, W, 3] or [H, W]"
        array = np.repeat(image[:, :, None], 3, axis=2) if image.ndim == 2 else image
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"expected {wanted}, found {image.dtype} {list(image.shape)}; convert it first")
    return array
