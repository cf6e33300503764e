"""Random changes of a small picture's shape and colour, on float values 0 to 255, [3, H, W].

Each operation is a pure function of the picture and of numbers drawn before (`Draws`).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from mmssl.config import ViewConfig

Matrix = npt.NDArray[np.float64]

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
_ERASE_RATIO = (0.3, 1 / 0.3)
_CROP_ATTEMPTS = 10


class Draws(NamedTuple):
    """All the randomness of one rendering: numbers uniform in [0, 1).

    Every number is drawn whether it is used or not, in this order. So a generator gives the same crop
    whatever else a view does, and turning one operation on does not change the others.
    """

    crop_area: tuple[float, ...]
    crop_ratio: tuple[float, ...]
    crop_top: float
    crop_left: float
    flip: float
    affine: float
    angle: float
    shift_x: float
    shift_y: float
    scale: float
    jitter: float
    brightness: float
    contrast: float
    saturation: float
    hue: float
    gray: float
    invert: float
    solarize: float
    blur: float
    blur_sigma: float
    erase: float
    erase_area: float
    erase_ratio: float
    erase_top: float
    erase_left: float
    changed: float
    posterize: float
    posterize_levels: float
    outline: float
    outline_strength: float


def draw(rng: np.random.Generator) -> Draws:
    """Draw one rendering's numbers; always takes the same count of them from `rng`."""
    scalars = len(Draws._fields) - 2
    numbers: list[float] = rng.random(2 * _CROP_ATTEMPTS + scalars).tolist()
    areas, ratios = numbers[:_CROP_ATTEMPTS], numbers[_CROP_ATTEMPTS : 2 * _CROP_ATTEMPTS]
    return Draws(tuple(areas), tuple(ratios), *numbers[2 * _CROP_ATTEMPTS :])


def between(bounds: tuple[float, float], u: float) -> float:
    """The number at fraction `u` of the way between the bounds."""
    return bounds[0] + (bounds[1] - bounds[0]) * u


def between_log(bounds: tuple[float, float], u: float) -> float:
    """The same for the logarithm: equal chances for x and 1/x."""
    return math.exp(between((math.log(bounds[0]), math.log(bounds[1])), u))


def augment(picture: Tensor, config: ViewConfig, draws: Draws) -> Tensor:
    """Apply the operations that were drawn to a picture, uint8 [3, H, W]; rounds once, at the end."""
    recolour = draws.jitter < config.color_jitter or draws.gray < config.gray or draws.invert < config.invert
    steps: list[tuple[bool, Callable[[Tensor], Tensor]]] = [
        (draws.outline < config.outline, lambda x: outline(x, between(_OUTLINE_STRENGTH, draws.outline_strength))),
        (draws.posterize < config.posterize, lambda x: posterize(x, draws.posterize_levels)),
        (draws.affine < config.affine, lambda x: affine(x, config, draws)),
        (recolour, lambda x: change_colours(x, config, draws)),
        (draws.solarize < config.solarize, solarize),
        (draws.blur < config.blur, lambda x: gaussian_blur(x, between(_BLUR_SIGMA, draws.blur_sigma) * x.shape[-1])),
        (draws.erase < config.erase, lambda x: erase(x, draws)),
    ]
    chosen = [step for drawn, step in steps if drawn]
    if not chosen or draws.changed >= config.changed:
        return picture
    x = picture.float()
    for step in chosen:
        x = step(x)
    return x.round_().to(torch.uint8)


def affine(x: Tensor, config: ViewConfig, draws: Draws) -> Tensor:
    """Rotate, scale and shift by up to 10 % of the side, about the centre, as `config.affine_*` say."""
    angle = math.radians(config.affine_degrees) * (2 * draws.angle - 1)
    scale = between(config.affine_scale, draws.scale)
    # Where each output pixel comes from, in coordinates that run from -1 to 1 over the picture.
    right, down = (2 * _AFFINE_SHIFT * (2 * u - 1) for u in (draws.shift_x, draws.shift_y))
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    inverse = [[cos, sin, -cos * right - sin * down], [-sin, cos, sin * right - cos * down]]
    grid = F.affine_grid(torch.tensor([inverse]), [1, *x.shape], align_corners=False)
    if config.affine_fill == "mirror":
        return F.grid_sample(x[None], grid, mode="bilinear", padding_mode="reflection", align_corners=False)[0]
    # Outside the negative lies black: white once it is turned back.
    return 255 - F.grid_sample(255 - x[None], grid, mode="bilinear", padding_mode="zeros", align_corners=False)[0]


def outline(x: Tensor, strength: float) -> Tensor:
    """Darken each pixel by how much its 3 x 3 neighbourhood differs in any colour."""
    contrast = (F.max_pool2d(x[None], 3, 1, 1) + F.max_pool2d(-x[None], 3, 1, 1))[0].amax(0)
    return x * (1 - (strength * contrast - _OUTLINE_THRESHOLD).div_(255).clamp_(0, 1))


def posterize(x: Tensor, u: float) -> Tensor:
    """Keep a few evenly spaced levels of each colour; `u` in [0, 1) picks how many."""
    low, high = _POSTERIZE_LEVELS
    gap = 255 / (low + int(u * (high - low + 1)) - 1)
    return (x / gap).round_() * gap


def change_colours(x: Tensor, config: ViewConfig, draws: Draws) -> Tensor:
    """Jitter, gray and negative as one affine map of the colours, clamped once."""
    matrix, offset = np.eye(3), np.zeros(3)
    if draws.jitter < config.color_jitter:
        mean = x.mean(dim=(1, 2), dtype=torch.float64).numpy()
        matrix, offset = jitter(config.color_jitter_strength, draws, mean)
    if draws.gray < config.gray:
        matrix, offset = _GRAY @ matrix, _GRAY @ offset
    if draws.invert < config.invert:
        matrix, offset = -matrix, 255 - offset
    weights, bias = torch.from_numpy(matrix).float(), torch.from_numpy(offset).float()
    return torch.addmm(bias[:, None], weights, x.reshape(3, -1)).clamp_(0, 255).view_as(x)


def jitter(strength: tuple[float, float, float, float], draws: Draws, mean: Matrix) -> tuple[Matrix, Matrix]:
    """Brightness, contrast, saturation and hue, in this order, as a matrix [3, 3] and an offset [3].

    Contrast is about the gray value of the picture's `mean` colour. The first three are torchvision's
    definitions without its clamping in between; hue rotates the chroma plane of YIQ, which keeps the luma.
    """
    numbers = (draws.brightness, draws.contrast, draws.saturation)
    brightness, contrast, saturation = (
        between((max(0.0, 1 - s), 1 + s), u) for s, u in zip(strength[:3], numbers, strict=True)
    )
    turn = 2 * math.pi * strength[3] * (2 * draws.hue - 1)
    rotation = np.eye(3)
    rotation[1:, 1:] = [[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]]
    colours = _RGB @ rotation @ _YIQ @ (saturation * np.eye(3) + (1 - saturation) * _GRAY)
    gray = brightness * (LUMA @ mean)
    return colours * (brightness * contrast), colours @ np.full(3, (1 - contrast) * gray)


def solarize(x: Tensor) -> Tensor:
    """Invert the values above one half: min(x, 255 - x)."""
    return 127.5 - (x - 127.5).abs_()


def gaussian_blur(x: Tensor, sigma: float) -> Tensor:
    """Gaussian of `sigma` pixels, cut off at 3 sigma, mirrored at the borders."""
    radius = max(1, math.ceil(3 * sigma))
    weights = [math.exp(-0.5 * (tap / sigma) ** 2) for tap in range(radius + 1)]
    total = weights[0] + 2 * sum(weights[1:])
    for dim, around in ((1, [0, 0, radius, radius]), (2, [radius, radius, 0, 0])):
        size = x.shape[dim]
        padded = F.pad(x[None], around, mode="reflect")[0]
        # Shifted sums: three times as fast as a convolution of three planes.
        x = padded.narrow(dim, radius, size) * (weights[0] / total)
        for tap, weight in enumerate(weights[1:], start=1):
            x.add_(padded.narrow(dim, radius - tap, size), alpha=weight / total)
            x.add_(padded.narrow(dim, radius + tap, size), alpha=weight / total)
    return x


def erase(x: Tensor, draws: Draws) -> Tensor:
    """Paint one rectangle in the picture's mean colour (random erasing, Zhong et al. 2017)."""
    side_y, side_x = x.shape[1:]
    area = side_y * side_x * between(_ERASE_AREA, draws.erase_area)
    ratio = between_log(_ERASE_RATIO, draws.erase_ratio)
    height = max(1, min(side_y, round(math.sqrt(area * ratio))))
    width = max(1, min(side_x, round(math.sqrt(area / ratio))))
    top, left = int(draws.erase_top * (side_y - height + 1)), int(draws.erase_left * (side_x - width + 1))
    erased = x.clone()
    erased[:, top : top + height, left : left + width] = x.mean(dim=(1, 2), keepdim=True)
    return erased
