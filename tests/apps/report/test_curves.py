"""Curves and the map: what is thinned keeps its shape, and the plane is that of other libraries."""

import base64
import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA

from mmssl.apps.report.curves import POINTS, thinned
from mmssl.apps.report.space import SHEET_COLUMNS, SHEET_SIDE, main_directions, plane, sheet


def test_thinning_keeps_the_mean() -> None:
    """A long curve becomes a short one of the same mean, in the same order; a short one stays as it is."""
    points = [(float(step), math.sin(step / 50)) for step in range(6000)]
    x, y = thinned(points)
    assert len(x) == len(y) == POINTS
    assert x == sorted(x)
    assert np.mean(y) == pytest.approx(np.mean([value for _, value in points]), abs=1e-4)
    assert thinned(points[:7])[0] == [0, 1, 2, 3, 4, 5, 6]


def test_the_main_directions_are_scikit_learns() -> None:
    """Coordinates equal those of PCA but for the sign of an axis."""
    features = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 9)
    expected = PCA(2).fit_transform(features.double().numpy())
    np.testing.assert_allclose(np.abs(main_directions(features)), np.abs(expected), atol=1e-5)


def test_the_map_puts_like_to_like() -> None:
    """Images of two kinds fall into two heaps; positions fill the unit square; few points take the plain way."""
    centres = torch.nn.functional.normalize(torch.randn(2, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    noise = 0.05 * torch.randn(80, 16, generator=torch.Generator().manual_seed(1))
    kinds = torch.arange(80) % 2
    places, method = plane(torch.nn.functional.normalize(centres[kinds] + noise, dim=-1))
    assert method == "t-SNE"
    assert places.min() == 0
    assert places.max() == 1
    distance = np.linalg.norm(places[:, None] - places[None], axis=-1) + 9 * np.eye(80)
    assert (kinds.numpy()[distance.argmin(1)] == kinds.numpy()).all()
    assert plane(torch.eye(4))[1] == "PCA"


def test_a_sheet_has_every_image_in_its_place() -> None:
    """The image of index i stands in row i // columns and column i % columns."""
    shades = [np.full((10, 10, 3), 3 * i, dtype=np.uint8) for i in range(SHEET_COLUMNS + 2)]
    coded = sheet(shades).removeprefix("data:image/webp;base64,")
    canvas = np.asarray(Image.open(io.BytesIO(base64.b64decode(coded))).convert("RGB")).astype(int)
    assert canvas.shape == (2 * SHEET_SIDE, SHEET_COLUMNS * SHEET_SIDE, 3)
    for i in (0, 1, SHEET_COLUMNS + 1):
        top, left = i // SHEET_COLUMNS * SHEET_SIDE, i % SHEET_COLUMNS * SHEET_SIDE
        middle = canvas[top + SHEET_SIDE // 2, left + SHEET_SIDE // 2]
        assert np.abs(middle - 3 * i).max() < 12
