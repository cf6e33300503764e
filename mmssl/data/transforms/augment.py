"""Random changes of small images' shape and colour, many at a time, on whichever device they lie.

Each operation is a pure function of images, float [n, 3, S, S] with values 0 to 255, and of numbers drawn before
(`AugmentParams`), of which each image has its own.
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
"""ITU-R BT.601 weights of red, green and blue in a gray value."""
_YIQ = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
"""RGB to the luma and chroma of NTSC; a hue shift rotates the last two."""
_RGB = np.linalg.inv(_YIQ)
_GRAY = np.ones((3, 1)) * LUMA
_AFFINE_SHIFT = 0.1
_BLUR_SIGMA = (0.1 / 224, 2.0 / 224)
_POSTERIZE_LEVELS = (3, 6)
_OUTLINE_STRENGTH = (1.0, 4.0)
_OUTLINE_THRESHOLD = 38.0
"""Local contrast, of 255, that is too weak for an outline."""
_ERASE_AREA = (0.02, 0.2)
_ERASE_LOG_RATIO = (math.log(0.3), -math.log(0.3))
_ROWS = 256
"""Images that are changed together: float copies of a large batch would fill a device."""


def finish_views(batch: Batch, views: Mapping[str, ViewConfig]) -> Batch:
    """Change the views of a batch that came with their draws, where the batch is."""
    done = {}
    for name, drawn in batch.augment_params.items():
        images, config = batch.views[name], views[name]
        parts = [slice(start, start + _ROWS) for start in range(0, len(drawn), _ROWS)]
        done[name] = torch.cat([augment(images[part], config, from_rows(drawn[part])) for part in parts])
    return replace(batch, views={**batch.views, **done}, augment_params={})


def augments(config: ViewConfig) -> bool:
    """Whether a view may be changed at all."""
    return config.flip > 0 or any(chance > 0 for chance in _chances(config))


def augment(images: Tensor, config: ViewConfig, augment_params: AugmentParams[Column]) -> Tensor:
    """Flip images, uint8 [n, 3, S, S], and apply what else was drawn for each; rounds once, at the end."""
    images = _where(augment_params.flip < config.flip, images, config, augment_params, lambda x, _, __: x.flip(-1))
    first = (
        augment_params.outline,
        augment_params.posterize,
        augment_params.affine,
        augment_params.jitter,
        augment_params.gray,
        augment_params.invert,
    )
    numbers = (*first, augment_params.solarize, augment_params.blur, augment_params.erase)
    drawn = [
        (number < chance) & (augment_params.augment < config.augment)
        for number, chance in zip(numbers, _chances(config), strict=True)
    ]
    outlined, posterized, moved, jittered, grayed, inverted, solarized, blurred, erased = drawn
    steps: list[tuple[npt.NDArray[np.bool_], Step]] = [
        (outlined, outline),
        (posterized, posterize),
        (moved, affine),
        (jittered | grayed | inverted, change_colours),
        (solarized, solarize),
        (blurred, gaussian_blur),
        (erased, erase),
    ]

    def change(x: Tensor, config: ViewConfig, augment_params: AugmentParams[Column]) -> Tensor:
        x = x.float()
        for chosen, step in steps:
            x = _where(chosen[changed], x, config, augment_params, step)
        return x.round_().to(torch.uint8)

    changed = np.logical_or.reduce(drawn)
    return _where(changed, images, config, augment_params, change)


def _chances(config: ViewConfig) -> tuple[float, ...]:
    first = (config.outline, config.posterize, config.affine, config.color_jitter, config.gray, config.invert)
    return (*first, config.solarize, config.blur, config.erase)


def _where(
    chosen: npt.NDArray[np.bool_], images: Tensor, config: ViewConfig, augment_params: AugmentParams[Column], step: Step
) -> Tensor:
    """The images, with those that are chosen given to a step. The choice is made on the host: no device is asked."""
    if chosen.all():
        return step(images, config, augment_params)
    if not chosen.any():
        return images
    rows = torch.from_numpy(np.flatnonzero(chosen)).to(images.device, non_blocking=True)
    return images.index_copy(0, rows, step(images[rows], config, select(augment_params, chosen)))


def affine(x: Tensor, config: ViewConfig, augment_params: AugmentParams[Column]) -> Tensor:
    """Rotate, scale and shift by up to 10 % of the side, about the centre, as `config.affine_*` say."""
    angle = math.radians(config.affine_degrees) * (2 * augment_params.angle - 1)
    scale = between(config.affine_scale, augment_params.scale)
    # Where each output pixel comes from, in coordinates that run from -1 to 1 over the image.
    right, down = (2 * _AFFINE_SHIFT * (2 * u - 1) for u in (augment_params.shift_x, augment_params.shift_y))
    cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
    inverse = np.array([[cos, sin, -cos * right - sin * down], [-sin, cos, sin * right - cos * down]])
    grid = F.affine_grid(_beside(inverse.transpose(2, 0, 1), x), list(x.shape), align_corners=False)
    if config.affine_fill == "mirror":
        return F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    # Outside the negative lies black: white once it is turned back.
    return 255 - F.grid_sample(255 - x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def outline(x: Tensor, config: ViewConfig, augment_params: AugmentParams[Column]) -> Tensor:
    """Darken each pixel by how much its 3 x 3 neighbourhood differs in any colour."""
    strength = _each(between(_OUTLINE_STRENGTH, augment_params.outline_strength), x)
    contrast = (F.max_pool2d(x, 3, 1, 1) + F.max_pool2d(-x, 3, 1, 1)).amax(1, keepdim=True)
    return x * (1 - (strength * contrast - _OUTLINE_THRESHOLD).div_(255).clamp_(0, 1))


def posterize(x: Tensor, config: ViewConfig, augment_params: AugmentParams[Column]) -> Tensor:
    """Keep a few evenly spaced levels of each colour."""
    low, high = _POSTERIZE_LEVELS
    gap = _each(255 / (low + np.floor(augment_params.posterize_levels * (high - low + 1)) - 1), x)
    return (x / gap).round_() * gap


def change_colours(x: Tensor, config: ViewConfig, augment_params: AugmentParams[Column]) -> Tensor:
    """Jitter, gray and negative as one affine map of the colours, clamped once."""
    jittered, grayed, inverted = (
        (number < chance)[:, None]
        for number, chance in (
            (augment_params.jitter, config.color_jitter),
            (augment_params.gray, config.gray),
            (augment_params.invert, config.invert),
        )
    )
    matrix, of_mean = jitter(config.color_jitter_strength, augment_params)
    matrix = np.where(jittered[..., None], matrix, np.eye(3))
    of_mean = np.where(jittered, of_mean, 0.0)
    matrix = np.where(grayed[..., None], _GRAY @ matrix, matrix)
    of_mean = np.where(grayed, of_mean @ _GRAY.T, of_mean)
    sign = np.where(inverted, -1.0, 1.0)
    offset = _beside(np.where(inverted, 255.0, 0.0), x)
    if jittered.any():
        mean = x.mean((2, 3)) @ _beside(LUMA, x)
        offset = offset + _beside(sign * of_mean, x) * mean[:, None]
    weights = _beside(sign[..., None] * matrix, x)
    return torch.baddbmm(offset[..., None].expand(-1, 3, 1), weights, x.flatten(2)).clamp_(0, 255).view_as(x)


def jitter(strength: tuple[float, float, float, float], augment_params: AugmentParams[Column]) -> tuple[Matrix, Matrix]:
    """Brightness, contrast, saturation and hue, in this order, as matrices [n, 3, 3] and, per unit of the gray value of
    an image's mean colour, offsets [n, 3].

    Contrast is about that gray value. The first three are torchvision's definitions without its clamping in between;
    hue rotates the chroma plane of YIQ, which keeps the luma.
    """
    numbers = (augment_params.brightness, augment_params.contrast, augment_params.saturation)
    brightness, contrast, saturation = (
        between((max(0.0, 1 - s), 1 + s), u)[:, None, None] for s, u in zip(strength[:3], numbers, strict=True)
    )
    turn = 2 * math.pi * strength[3] * (2 * augment_params.hue - 1)
    rotation = np.zeros((len(turn), 3, 3))
    rotation[:, 0, 0] = 1
    rotation[:, 1, 1] = rotation[:, 2, 2] = np.cos(turn)
    rotation[:, 2, 1] = np.sin(turn)
    rotation[:, 1, 2] = -rotation[:, 2, 1]
    colours = _RGB @ rotation @ _YIQ @ (saturation * np.eye(3) + (1 - saturation) * _GRAY)
    return colours * (brightness * contrast), (colours * ((1 - contrast) * brightness)).sum(2)


def solarize(x: Tensor, config: ViewConfig, augment_params: AugmentParams[Column]) -> Tensor:
    """Invert the values above one half: min(x, 255 - x)."""
    return 127.5 - (x - 127.5).abs_()


def gaussian_blur(x: Tensor, config: ViewConfig, augment_params: AugmentParams[Column]) -> Tensor:
    """Gaussian of `draws.blur_sigma`, cut off at 3 sigma, mirrored at the borders."""
    sigma = between(_BLUR_SIGMA, augment_params.blur_sigma)[:, None] * x.shape[-1]
    reach = np.maximum(1, np.ceil(3 * sigma))
    radius = int(reach.max())
    tap = np.arange(radius + 1)
    weights = np.where(tap <= reach, np.exp(-0.5 * (tap / sigma) ** 2), 0.0)
    weights /= weights[:, :1] + 2 * weights[:, 1:].sum(1, keepdims=True)
    taps = [_each(column, x) for column in weights.T]
    for dim, around in ((2, [0, 0, radius, radius]), (3, [radius, radius, 0, 0])):
        size = x.shape[dim]
        padded = F.pad(x, around, mode="reflect")
        # Shifted sums: three times as fast as a convolution of three planes.
        x = padded.narrow(dim, radius, size) * taps[0]
        for shift, weight in enumerate(taps[1:], start=1):
            x.addcmul_(padded.narrow(dim, radius - shift, size), weight)
            x.addcmul_(padded.narrow(dim, radius + shift, size), weight)
    return x


def erase(x: Tensor, config: ViewConfig, augment_params: AugmentParams[Column]) -> Tensor:
    """Paint one rectangle in each image's mean colour (random erasing, Zhong et al. 2017)."""
    side = x.shape[-1]
    area = side**2 * between(_ERASE_AREA, augment_params.erase_area)
    ratio = np.exp(between(_ERASE_LOG_RATIO, augment_params.erase_ratio))
    along = torch.arange(side, device=x.device)
    inside = []
    for length, start in (
        (np.sqrt(area * ratio), augment_params.erase_top),
        (np.sqrt(area / ratio), augment_params.erase_left),
    ):
        length = np.clip(np.rint(length), 1, side)
        first = np.floor(start * (side - length + 1))
        begin, end = (_beside(edge, x)[:, None] for edge in (first, first + length))
        inside.append((along >= begin) & (along < end))
    rectangle = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return torch.where(rectangle, x.mean((2, 3), keepdim=True), x)


def _beside(numbers: Matrix, x: Tensor) -> Tensor:
    """Numbers in the type and on the device of some images."""
    return torch.from_numpy(np.ascontiguousarray(numbers)).to(x.dtype).to(x.device, non_blocking=True)


def _each(numbers: Column, x: Tensor) -> Tensor:
    """One number an image, to be spread over its pixels."""
    return _beside(numbers, x).view(-1, 1, 1, 1)
