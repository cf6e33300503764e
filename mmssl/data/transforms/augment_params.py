"""The random numbers of an image's rendering, drawn before anything is done, so that they can be used anywhere."""

import math
from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Column = npt.NDArray[np.float64]
"""One number of each of n renderings, [n]."""
T = TypeVar("T")
U = TypeVar("U", float, Column)

_CROP_ATTEMPTS = 10


class AugmentParams(NamedTuple, Generic[T]):
    """All the randomness of one rendering (T is float) or of several (T is Column): numbers uniform in [0, 1).

    Every number is drawn whether it is used or not, in this order. So a generator gives the same crop
    whatever else a view does, and turning one operation on does not change the others.
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
"""Numbers of a rendering beside the attempts at a crop."""


def draw_params(rng: np.random.Generator) -> AugmentParams[float]:
    """Draw one rendering's numbers; always takes the same count of them from `rng`."""
    numbers: list[float] = rng.random(2 * _CROP_ATTEMPTS + SCALARS).tolist()
    areas, ratios = numbers[:_CROP_ATTEMPTS], numbers[_CROP_ATTEMPTS : 2 * _CROP_ATTEMPTS]
    return AugmentParams(tuple(areas), tuple(ratios), *numbers[2 * _CROP_ATTEMPTS :])


def to_rows(augment_params: Sequence[AugmentParams[float]]) -> Tensor:
    """What comes after the crops of n renderings, float64 [n, SCALARS]."""
    return torch.tensor([one[2:] for one in augment_params], dtype=torch.float64)


def from_rows(rows: Tensor) -> AugmentParams[Column]:
    """What `to_rows` put together, number by number."""
    return AugmentParams((), (), *rows.numpy().T)


def select(augment_params: AugmentParams[Column], chosen: npt.NDArray[np.bool_]) -> AugmentParams[Column]:
    """The numbers of those renderings that are `chosen`, bool [n]."""
    return AugmentParams((), (), *(column[chosen] for column in augment_params[2:]))


def between(bounds: tuple[float, float], u: U) -> U:
    """The number at fraction `u` of the way between the bounds."""
    return bounds[0] + (bounds[1] - bounds[0]) * u


def between_log(bounds: tuple[float, float], u: float) -> float:
    """The same for the logarithm: equal chances for x and 1/x."""
    return math.exp(between((math.log(bounds[0]), math.log(bounds[1])), u))
