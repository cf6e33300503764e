"""Augmentations of image batches on any device: flips, affine maps, colour changes, blur, erasing.

Each operation is a pure function of images, float [n, 3, S, S] with values 0 to 255, and of `AugmentParams` drawn
beforehand for each image.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from mmssl.config import ViewConfig
from mmssl.data.transforms.augment_params import AugmentParams, Column, between, from_rows, select
from mmssl.types import Batch

Matrix = npt.NDArray[np.float64]
Step = Callable[[Tensor, ViewConfig, AugmentParams[Column]], Tensor]

LUMA = np.array([0.299, 0.587, 0.114])
"""ITU-R BT.601 weights of red, green and blue in the gray value."""
_YIQ = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
"""RGB to the luma and chroma of NTSC; a hue shift rotates the last two."""
_RGB = np.linalg.inv(_YIQ)
_GRAY = np.ones((3, 1)) * LUMA
_AFFINE_SHIFT = 0.1
_BLUR_SIGMA = (0.1 / 224, 2.0 / 224)
_POSTERIZE_LEVELS = (3, 6)
_OUTLINE_STRENGTH = (1.0, 4.0)
_OUTLINE_THRESHOLD = 38.0
"""Local contrast (0 to 255) below which no outline is drawn."""
_ERASE_AREA = (0.02, 0.2)
_ERASE_LOG_RATIO = (math.log(0.3), -math.log(0.3))
_ROWS = 256
"""Images augmented at a time: float copies of a large batch would fill a device."""


def finish_views(batch: Batch, views: Mapping[str, ViewConfig]) -> Batch:
    """Augment the views whose parameters came with the batch, on the device of the batch."""
    done = {}
    for name, rows in batch.augment_params.items():
        images, config = batch.views[name], views[name]
        chunks = [slice(start, start + _ROWS) for start in range(0, len(rows), _ROWS)]
        done[name] = torch.cat([augment(images[chunk], config, from_rows(rows[chunk])) for chunk in chunks])
    return replace(batch, views={**batch.views, **done}, augment_params={})


def has_augmentations(config: ViewConfig) -> bool:
    """True if a view has any augmentation other than its crop."""
    return config.flip > 0 or any(chance > 0 for chance in _chances(config))


def augment(images: Tensor, config: ViewConfig, params: AugmentParams[Column]) -> Tensor:
    """Augment images, uint8 [n, 3, S, S], each by its own parameters. Values are rounded once, at the end."""
    images = _apply_to(params.flip < config.flip, images, config, params, lambda x, _, __: x.flip(-1))
    first = (params.outline, params.posterize, params.affine, params.jitter, params.gray, params.invert)
    numbers = (*first, params.solarize, params.blur, params.erase)
    drawn = [
        (number < chance) & (params.augment < config.augment)
        for number, chance in zip(numbers, _chances(config), strict=True)
    ]
    outlined, posterized, moved, jittered, grayed, inverted, solarized, blurred, erased = drawn
    steps: list[tuple[npt.NDArray[np.bool_], Step]] = [
        (outlined, outline),
        (posterized, posterize),
        (moved, affine),
        (jittered | grayed | inverted, adjust_colours),
        (solarized, solarize),
        (blurred, gaussian_blur),
        (erased, erase),
    ]

    def apply_steps(x: Tensor, config: ViewConfig, params: AugmentParams[Column]) -> Tensor:
        x = x.float()
        for chosen, step in steps:
            x = _apply_to(chosen[augmented], x, config, params, step)
        return x.round_().to(torch.uint8)

    augmented = np.logical_or.reduce(drawn)
    return _apply_to(augmented, images, config, params, apply_steps)


def _chances(config: ViewConfig) -> tuple[float, ...]:
    first = (config.outline, config.posterize, config.affine, config.color_jitter, config.gray, config.invert)
    return (*first, config.solarize, config.blur, config.erase)


def _apply_to(
    chosen: npt.NDArray[np.bool_], images: Tensor, config: ViewConfig, params: AugmentParams[Column], step: Step
) -> Tensor:
    """Apply a step to the chosen images. The choice is made on the host, so the device is not synchronised."""
    if chosen.all():
        return step(images, config, params)
    if not chosen.any():
        return images
    rows = torch.from_numpy(np.flatnonzero(chosen)).to(images.device, non_blocking=True)
    return images.index_copy(0, rows, step(images[rows], config, select(params, chosen)))


def affine(x: Tensor, config: ViewConfig, params: AugmentParams[Column]) -> Tensor:
    """Rotate and scale about the centre within `config.affine_*`, and shift by up to 10 % of the side."""
    angle = math.radians(config.affine_degrees) * (2 * params.angle - 1)
    scale = between(config.affine_scale, params.scale)
    # Source of each output pixel, in coordinates from -1 to 1 over the image.
    right, down = (2 * _AFFINE_SHIFT * (2 * u - 1) for u in (params.shift_x, params.shift_y))
    cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
    inverse = np.array([[cos, sin, -cos * right - sin * down], [-sin, cos, sin * right - cos * down]])
    grid = F.affine_grid(_on_device_of(inverse.transpose(2, 0, 1), x), list(x.shape), align_corners=False)
    if config.affine_fill == "mirror":
        return F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    # Zeros fill the outside of the negative: they become white when it is inverted back.
    return 255 - F.grid_sample(255 - x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def outline(x: Tensor, config: ViewConfig, params: AugmentParams[Column]) -> Tensor:
    """Darken each pixel by the largest colour difference within its 3 x 3 neighbourhood."""
    strength = _per_image(between(_OUTLINE_STRENGTH, params.outline_strength), x)
    contrast = (F.max_pool2d(x, 3, 1, 1) + F.max_pool2d(-x, 3, 1, 1)).amax(1, keepdim=True)
    return x * (1 - (strength * contrast - _OUTLINE_THRESHOLD).div_(255).clamp_(0, 1))


def posterize(x: Tensor, config: ViewConfig, params: AugmentParams[Column]) -> Tensor:
    """Reduce each colour to a few evenly spaced levels."""
    low, high = _POSTERIZE_LEVELS
    gap = _per_image(255 / (low + np.floor(params.posterize_levels * (high - low + 1)) - 1), x)
    return (x / gap).round_() * gap


def adjust_colours(x: Tensor, config: ViewConfig, params: AugmentParams[Column]) -> Tensor:
    """Apply jitter, gray and inversion as one affine map of the colours, clamped once."""
    jittered, grayed, inverted = (
        (number < chance)[:, None]
        for number, chance in (
            (params.jitter, config.color_jitter),
            (params.gray, config.gray),
            (params.invert, config.invert),
        )
    )
    matrix, of_mean = jitter(config.color_jitter_strength, params)
    matrix = np.where(jittered[..., None], matrix, np.eye(3))
    of_mean = np.where(jittered, of_mean, 0.0)
    matrix = np.where(grayed[..., None], _GRAY @ matrix, matrix)
    of_mean = np.where(grayed, of_mean @ _GRAY.T, of_mean)
    sign = np.where(inverted, -1.0, 1.0)
    offset = _on_device_of(np.where(inverted, 255.0, 0.0), x)
    if jittered.any():
        mean = x.mean((2, 3)) @ _on_device_of(LUMA, x)
        offset = offset + _on_device_of(sign * of_mean, x) * mean[:, None]
    weights = _on_device_of(sign[..., None] * matrix, x)
    return torch.baddbmm(offset[..., None].expand(-1, 3, 1), weights, x.flatten(2)).clamp_(0, 255).view_as(x)


def jitter(strength: tuple[float, float, float, float], params: AugmentParams[Column]) -> tuple[Matrix, Matrix]:
    """Brightness, contrast, saturation and hue, in this order, as matrices [n, 3, 3] and offsets [n, 3].

    Offsets are per unit of the gray value of an image's mean colour, the fixed point of contrast. Brightness, contrast
    and saturation are defined as in torchvision, without clamping in between; hue rotates the chroma plane of YIQ,
    which keeps the luma.
    """
    numbers = (params.brightness, params.contrast, params.saturation)
    brightness, contrast, saturation = (
        between((max(0.0, 1 - s), 1 + s), u)[:, None, None] for s, u in zip(strength[:3], numbers, strict=True)
    )
    turn = 2 * math.pi * strength[3] * (2 * params.hue - 1)
    rotation = np.zeros((len(turn), 3, 3))
    rotation[:, 0, 0] = 1
    rotation[:, 1, 1] = rotation[:, 2, 2] = np.cos(turn)
    rotation[:, 2, 1] = np.sin(turn)
    rotation[:, 1, 2] = -rotation[:, 2, 1]
    colours = _RGB @ rotation @ _YIQ @ (saturation * np.eye(3) + (1 - saturation) * _GRAY)
    return colours * (brightness * contrast), (colours * ((1 - contrast) * brightness)).sum(2)


def solarize(x: Tensor, config: ViewConfig, params: AugmentParams[Column]) -> Tensor:
    """Invert the values above one half: min(x, 255 - x)."""
    return 127.5 - (x - 127.5).abs_()


def gaussian_blur(x: Tensor, config: ViewConfig, params: AugmentParams[Column]) -> Tensor:
    """Blur by a Gaussian of `params.blur_sigma`, cut off at 3 sigma, with mirrored borders."""
    sigma = between(_BLUR_SIGMA, params.blur_sigma)[:, None] * x.shape[-1]
    reach = np.maximum(1, np.ceil(3 * sigma))
    radius = int(reach.max())
    tap = np.arange(radius + 1)
    weights = np.where(tap <= reach, np.exp(-0.5 * (tap / sigma) ** 2), 0.0)
    weights /= weights[:, :1] + 2 * weights[:, 1:].sum(1, keepdims=True)
    taps = [_per_image(column, x) for column in weights.T]
    for dim, around in ((2, [0, 0, radius, radius]), (3, [radius, radius, 0, 0])):
        size = x.shape[dim]
        padded = F.pad(x, around, mode="reflect")
        # Shifted sums: three times as fast as a convolution of three planes.
        x = padded.narrow(dim, radius, size) * taps[0]
        for shift, weight in enumerate(taps[1:], start=1):
            x.addcmul_(padded.narrow(dim, radius - shift, size), weight)
            x.addcmul_(padded.narrow(dim, radius + shift, size), weight)
    return x


def erase(x: Tensor, config: ViewConfig, params: AugmentParams[Column]) -> Tensor:
    """Fill one rectangle with each image's mean colour (random erasing, Zhong et al. 2017)."""
    side = x.shape[-1]
    area = side**2 * between(_ERASE_AREA, params.erase_area)
    ratio = np.exp(between(_ERASE_LOG_RATIO, params.erase_ratio))
    along = torch.arange(side, device=x.device)
    inside = []
    for length, start in (
        (np.sqrt(area * ratio), params.erase_top),
        (np.sqrt(area / ratio), params.erase_left),
    ):
        length = np.clip(np.rint(length), 1, side)
        first = np.floor(start * (side - length + 1))
        begin, end = (_on_device_of(edge, x)[:, None] for edge in (first, first + length))
        inside.append((along >= begin) & (along < end))
    rectangle = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return torch.where(rectangle, x.mean((2, 3), keepdim=True), x)


def _on_device_of(numbers: Matrix, x: Tensor) -> Tensor:
    """Numbers as a tensor with the dtype and device of `x`."""
    return torch.from_numpy(np.ascontiguousarray(numbers)).to(x.dtype).to(x.device, non_blocking=True)


def _per_image(numbers: Column, x: Tensor) -> Tensor:
    """One number per image, as [n, 1, 1, 1]."""
    return _on_device_of(numbers, x).view(-1, 1, 1, 1)
