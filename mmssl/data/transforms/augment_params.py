"""Random numbers of one rendering of an image, drawn first so that augmentation can run on any device."""

import math
from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Column = npt.NDArray[np.float64]
"""One parameter of n renderings, [n]."""
T = TypeVar("T")
U = TypeVar("U", float, Column)

_CROP_ATTEMPTS = 10


class AugmentParams(NamedTuple, Generic[T]):
    """All random numbers of one rendering (T is float) or of several (T is Column), uniform in [0, 1).

    Every number is always drawn, in this order. So the crop does not depend on the other augmentations, and enabling
    one of them does not affect the rest.
    """

    crop_area: tuple[T, ...]
    crop_ratio: tuple[T, ...]
    crop_top: T
    crop_left: T
    flip: T
    affine: T
    angle: T
    shift_x: T
    shift_y: T
    scale: T
    jitter: T
    brightness: T
    contrast: T
    saturation: T
    hue: T
    gray: T
    invert: T
    solarize: T
    blur: T
    blur_sigma: T
    erase: T
    erase_area: T
    erase_ratio: T
    erase_top: T
    erase_left: T
    augment: T
    posterize: T
    posterize_levels: T
    outline: T
    outline_strength: T


SCALARS = len(AugmentParams._fields) - 2
"""Number of parameters per rendering, without those of the crop attempts."""


def draw_params(rng: np.random.Generator) -> AugmentParams[float]:
    """Draw the parameters of one rendering. Always takes the same count of numbers from `rng`."""
    numbers: list[float] = rng.random(2 * _CROP_ATTEMPTS + SCALARS).tolist()
    areas, ratios = numbers[:_CROP_ATTEMPTS], numbers[_CROP_ATTEMPTS : 2 * _CROP_ATTEMPTS]
    return AugmentParams(tuple(areas), tuple(ratios), *numbers[2 * _CROP_ATTEMPTS :])


def to_rows(params: Sequence[AugmentParams[float]]) -> Tensor:
    """Stack the parameters of n renderings, without the crop attempts: float64 [n, SCALARS]."""
    return torch.tensor([one[2:] for one in params], dtype=torch.float64)


def from_rows(rows: Tensor) -> AugmentParams[Column]:
    """Split rows of `to_rows` into one column per parameter."""
    return AugmentParams((), (), *rows.numpy().T)


def select(params: AugmentParams[Column], chosen: npt.NDArray[np.bool_]) -> AugmentParams[Column]:
    """Parameters of the renderings where `chosen`, bool [n], is True."""
    return AugmentParams((), (), *(column[chosen] for column in params[2:]))


def between(bounds: tuple[float, float], u: U) -> U:
    """Interpolate linearly between the bounds at fraction `u`."""
    return bounds[0] + (bounds[1] - bounds[0]) * u


def between_log(bounds: tuple[float, float], u: float) -> float:
    """Interpolate between the logarithms of the bounds: x and 1/x are equally likely."""
    return math.exp(between((math.log(bounds[0]), math.log(bounds[1])), u))
