"""Augmentations against torchvision, Pillow, colorsys and loops."""

import colorsys
import math
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from mmssl.config import ViewConfig
from mmssl.data.transforms import augment
from mmssl.data.transforms.augment_params import AugmentParams, Column, draw_params, from_rows, to_rows
from tests.helpers.images import photo

OPERATIONS = ("affine", "color_jitter", "gray", "invert", "solarize", "posterize", "outline", "blur", "erase")
STRENGTH = (0.4, 0.3, 0.2, 0.1)


def augment_params(**values: float) -> AugmentParams[Column]:
    """Parameters that turn every operation off and sit in the middle of every range, except for `values`."""
    names = (
        "flip",
        "affine",
        "jitter",
        "gray",
        "invert",
        "solarize",
        "blur",
        "erase",
        "posterize",
        "outline",
    )
    scalars = dict.fromkeys(AugmentParams._fields[2:], 0.5) | dict.fromkeys(names, 1.0) | values
    return AugmentParams((), (), **{name: np.array([float(value)]) for name, value in scalars.items()})


def one(step: augment.Step, x: Tensor, config: ViewConfig | None = None, **values: float) -> Tensor:
    """An operation on one image [3, S, S]."""
    return step(x[None], config or ViewConfig(), augment_params(**values))[0]


def image(size: int = 64) -> Tensor:
    """A photograph, float values 0 to 255, [3, size, size]."""
    return torch.from_numpy(np.array(photo(300, 300).resize((size, size)))).permute(2, 0, 1).float()


def calm() -> Tensor:
    """The photograph with its contrast reduced, so that nothing is clamped."""
    return 100 + image() * 0.15


def jittered(x: Tensor, strength: tuple[float, float, float, float], **values: float) -> Tensor:
    """The jitter alone, before any clamping."""
    matrix, of_gray = augment.jitter(strength, augment_params(**values))
    gray = float(x.mean(dim=(1, 2)).double() @ torch.from_numpy(augment.LUMA))
    shift = torch.from_numpy(of_gray[0] * gray).float()[:, None, None]
    return torch.einsum("ij,jhw->ihw", torch.from_numpy(matrix[0]).float(), x) + shift


def test_every_number_is_drawn_every_time() -> None:
    """Every draw takes all numbers from the generator, in the order of the fields; rows keep them."""
    once, two = np.random.default_rng(3), np.random.default_rng(3)
    first, second = draw_params(once), draw_params(once)
    numbers = two.random(2 * (20 + len(AugmentParams._fields) - 2))
    flat = [
        *first.crop_area,
        *first.crop_ratio,
        *first[2:],
        *second.crop_area,
        *second.crop_ratio,
        *second[2:],
    ]
    np.testing.assert_array_equal(flat, numbers)
    for column, values in zip(
        from_rows(to_rows([first, second]))[2:], zip(first[2:], second[2:], strict=True), strict=True
    ):
        np.testing.assert_array_equal(column, values)


@pytest.mark.parametrize("u", [0.0, 0.2, 0.5, 0.99])
def test_brightness_contrast_saturation_equal_torchvision(u: float) -> None:
    """One matrix does what torchvision does in three passes, to a hundredth of 1/255."""
    x = calm()
    factors = [1 + s * (2 * u - 1) for s in STRENGTH[:3]]
    expected = tv.adjust_brightness(x / 255, factors[0])
    expected = tv.adjust_saturation(tv.adjust_contrast(expected, factors[1]), factors[2]) * 255
    ours = jittered(x, (*STRENGTH[:3], 0.0), brightness=u, contrast=u, saturation=u)
    assert (ours - expected).abs().max() < 0.05


@pytest.mark.parametrize("u", [0.0, 0.3, 0.9])
def test_hue_rotates_the_chroma_of_yiq(u: float) -> None:
    """Hue turns (I, Q) of colorsys's YIQ by the angle and keeps Y."""
    x = calm()
    ours = jittered(x, (0.0, 0.0, 0.0, 0.25), hue=u)
    turn = 2 * math.pi * 0.25 * (2 * u - 1)
    for row, column in ((3, 5), (20, 40), (50, 11), (63, 63)):
        y, i, q = colorsys.rgb_to_yiq(*(x[:, row, column] / 255).tolist())
        i, q = math.cos(turn) * i - math.sin(turn) * q, math.sin(turn) * i + math.cos(turn) * q
        expected = 255 * torch.tensor(colorsys.yiq_to_rgb(y, i, q))
        assert (ours[:, row, column] - expected).abs().max() < 1.5  # colorsys rounds its coefficients to 2 digits
    luma = torch.tensor(augment.LUMA).float()
    torch.testing.assert_close(torch.einsum("c,chw", luma, ours), torch.einsum("c,chw", luma, x))


def test_a_full_turn_of_hue_changes_nothing() -> None:
    """Half a turn either way is the same; a whole one is none."""
    x = calm()
    torch.testing.assert_close(jittered(x, (0, 0, 0, 1.0), hue=1.0), x, atol=0.01, rtol=0)
    torch.testing.assert_close(
        jittered(x, (0, 0, 0, 0.5), hue=0.0), jittered(x, (0, 0, 0, 0.5), hue=1.0), atol=0.01, rtol=0
    )


def test_gray_invert_and_solarize_equal_torchvision() -> None:
    """Gray is Rec. 601 luma on three planes; the negative is 255 - x; solarize negates from 128 up."""
    x = image()
    gray = one(augment.adjust_colours, x, ViewConfig(gray=1), gray=0)
    assert (gray - tv.rgb_to_grayscale(x / 255, 3) * 255).abs().max() < 0.05
    negative = one(augment.adjust_colours, x, ViewConfig(invert=1), invert=0)
    torch.testing.assert_close(negative, 255 - x)
    byte = x.to(torch.uint8)
    torch.testing.assert_close(one(augment.solarize, x).to(torch.uint8), tv.solarize(byte, threshold=128))


def test_colours_are_clamped_once() -> None:
    """Values pushed out of range by the jitter saturate; they never wrap around."""
    config = ViewConfig(color_jitter=1, color_jitter_strength=(0.9, 0.9, 0.9, 0.5))
    for u in (0.0, 0.999):
        out = one(augment.adjust_colours, image(), config, jitter=0, brightness=u, contrast=u, saturation=u, hue=u)
        assert 0 <= out.min() <= out.max() <= 255


def blurred(x: Tensor, sigma: float) -> Tensor:
    """Blurred by `sigma` pixels: the draw that gives as much lies beyond [0, 1) on small images."""
    return one(augment.gaussian_blur, x, blur_sigma=(224 * sigma / x.shape[-1] - 0.1) / 1.9)


@pytest.mark.parametrize("sigma", [0.05, 0.4, 1.0, 2.0])
def test_blur_equals_torchvision(sigma: float) -> None:
    """The blur is torchvision's gaussian_blur with a kernel that reaches 3 sigma."""
    x = image()
    width = 2 * max(1, math.ceil(3 * sigma)) + 1
    expected = tv.gaussian_blur(x, [width, width], [sigma, sigma])
    assert (blurred(x, sigma) - expected).abs().max() < 0.02


def test_blur_of_the_smallest_images() -> None:
    """An image of 8 px, the smallest a model may have, can be blurred; a flat one stays flat."""
    flat = torch.full((3, 8, 8), 77.0)
    torch.testing.assert_close(blurred(flat, 2.0), flat)


@pytest.mark.parametrize("fill", ["mirror", "white"])
@pytest.mark.parametrize(
    ("angle", "shift_x", "shift_y", "scale"),
    [(0, 0.5, 0.5, 0.5), (1, 0.5, 0.5, 0.5), (0.5, 1, 0.2, 0.5), (0.8, 0.3, 0.9, 0.1)],
)
def test_affine_equals_torchvision(
    angle: float, shift_x: float, shift_y: float, scale: float, fill: Literal["mirror", "white"]
) -> None:
    """Rotation, shift and scale are torchvision's affine; with white outside, everywhere."""
    x, side = image(), 64
    config = ViewConfig(affine_degrees=30, affine_scale=(0.8, 1.1), affine_fill=fill)
    ours = one(augment.affine, x, config, angle=angle, shift_x=shift_x, shift_y=shift_y, scale=scale)
    parameters = {
        "angle": 30.0 * (2 * angle - 1),
        "translate": [0.1 * side * (2 * shift_x - 1), 0.1 * side * (2 * shift_y - 1)],
        "scale": 0.8 + 0.3 * scale,
        "shear": [0.0, 0.0],
    }
    mode = v2.InterpolationMode.BILINEAR
    theirs = 255 - tv.affine(255 - x, **parameters, interpolation=mode)
    # The warped image of ones says where nothing comes from outside.
    inside = tv.affine(torch.ones_like(x), **parameters, interpolation=mode) > 0.999
    assert inside.float().mean() > 0.4
    assert (ours - theirs)[inside].abs().max() < 0.1
    if fill == "white":
        assert (ours - theirs).abs().max() < 0.1


def test_affine_mirrors_what_lies_outside() -> None:
    """No border colour appears: a flat image stays flat under any rotation."""
    flat = torch.full((3, 32, 32), 201.0)
    config = ViewConfig(affine_degrees=180, affine_scale=(0.5, 0.6))
    torch.testing.assert_close(one(augment.affine, flat, config, angle=0.3, shift_x=0.0), flat)


@pytest.mark.parametrize("strength", [1.0, 2.5, 4.0])
def test_outline_darkens_edges(strength: float) -> None:
    """A pixel fades by the largest difference of any colour in its 3 x 3 neighbourhood; flat areas stay."""
    x = image(24)
    expected = x.clone()
    for row in range(24):
        for column in range(24):
            around = x[:, max(0, row - 1) : row + 2, max(0, column - 1) : column + 2].flatten(1)
            contrast = float((around.amax(1) - around.amin(1)).max())
            expected[:, row, column] *= 1 - min(max((strength * contrast - 38) / 255, 0), 1)
    drawn = (strength - 1) / 3
    torch.testing.assert_close(one(augment.outline, x, outline_strength=drawn), expected)
    flat = torch.full((3, 8, 8), 77.0)
    torch.testing.assert_close(one(augment.outline, flat, outline_strength=drawn), flat)


@pytest.mark.parametrize(("u", "levels"), [(0.0, 3), (0.3, 4), (0.6, 5), (0.99, 6)])
def test_posterize_keeps_few_levels(u: float, levels: int) -> None:
    """Every value moves to the nearest of 3 to 6 evenly spaced ones, black and white among them."""
    ramp = torch.arange(256.0).expand(3, 256, 256)
    out = one(augment.posterize, ramp, posterize_levels=u)
    torch.testing.assert_close(out.unique(), torch.linspace(0, 255, levels))
    assert (out - ramp).abs().max() <= 255 / (levels - 1) / 2


def test_erase_paints_one_rectangle_of_stated_size() -> None:
    """The erased part is a rectangle of 2 to 20 % of the area in the mean colour; the rest is untouched."""
    x = torch.rand(3, 64, 64) * 255
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(300):
        out = augment.erase(x[None], ViewConfig(), from_rows(to_rows([draw_params(rng)])))[0]
        changed = (out != x).any(0)
        down, along = changed.any(1).nonzero(), changed.any(0).nonzero()
        top, bottom, left, right = int(down[0]), int(down[-1]) + 1, int(along[0]), int(along[-1]) + 1
        assert changed[top:bottom, left:right].all()
        torch.testing.assert_close(out[:, top, left], x.mean(dim=(1, 2)))
        shares.append((bottom - top) * (right - left) / 64**2)
    assert 0.015 < min(shares) < 0.04
    assert 0.17 < max(shares) < 0.21
    assert abs(np.mean(shares) - 0.11) < 0.015


def test_augment_leaves_its_input_alone() -> None:
    """With everything on, the given image is not written to; with nothing on, it is returned as it is."""
    byte = image().to(torch.uint8)[None]
    copy = byte.clone()
    drawn = from_rows(to_rows([draw_params(np.random.default_rng(1))]))
    everything = ViewConfig(**dict.fromkeys(OPERATIONS, 1.0))
    out = augment.augment(byte, everything, drawn)
    assert out.dtype == torch.uint8
    assert not torch.equal(out, byte)
    assert torch.equal(byte, copy)
    assert augment.augment(byte, ViewConfig(), drawn) is byte


@pytest.mark.parametrize("chance", [0.15, 0.5, 1.0])
@pytest.mark.parametrize("share", [0.6, 1.0])
@pytest.mark.parametrize("fill", ["mirror", "white"])
def test_a_batch_is_augmented_as_its_images_are(chance: float, share: float, fill: Literal["mirror", "white"]) -> None:
    """Together or one by one, each image is the same to 1/255, whatever was drawn for the others."""
    rng = np.random.default_rng(7)
    images = torch.from_numpy(rng.integers(0, 256, (24, 3, 32, 32), dtype=np.uint8))
    images[:12] = image(32).to(torch.uint8)
    config = ViewConfig(**dict.fromkeys(OPERATIONS, chance), flip=chance, augment=share, affine_fill=fill)
    drawn = [draw_params(rng) for _ in images]
    together = augment.augment(images, config, from_rows(to_rows(drawn)))
    alone = torch.cat(
        [augment.augment(p[None], config, from_rows(to_rows([d]))) for p, d in zip(images, drawn, strict=True)]
    )
    assert (together.int() - alone.int()).abs().max() <= 1
    assert (together != alone).float().mean() < 0.001
    touched = (together != images).flatten(1).any(1).float().mean()
    assert touched > 0.4
