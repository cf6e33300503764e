"""The tests of explanations are themselves right."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from mmssl.models import DualEncoder
from scripts.bench.explain import (
    CONTRAST,
    RANDOM,
    STEPS,
    contrast,
    deletion,
    on_cells,
    rank_correlations,
    ranks,
    sanity,
    shuffled,
)
from tests.apps.explain.conftest import COLUMN, RESNET, ROW, images_and_texts, small_encoder


def test_shuffled_weights_are_the_same_numbers_elsewhere() -> None:
    """Every parameter keeps its values and loses their order; the model itself is untouched."""
    encoder = small_encoder(**RESNET)
    before = {name: p.detach().clone() for name, p in encoder.named_parameters()}
    other = dict(shuffled(encoder).named_parameters())
    assert all(torch.equal(p, before[name]) for name, p in encoder.named_parameters())
    for name, value in before.items():
        assert torch.equal(other[name].flatten().sort().values, value.flatten().sort().values)
    assert not torch.equal(other["image_projection.weight"], before["image_projection.weight"])


def test_ranks_are_permutations_and_equals_are_mixed() -> None:
    """The most relevant patch comes first, each place is given once, and equal patches are not taken in their order."""
    relevance = torch.zeros(50, 4, 4)
    relevance[:, 2, 3] = 1
    found = ranks(relevance)
    assert torch.equal(found.sort(1).values, torch.arange(16).expand(50, -1))
    assert bool((found[:, 11] == 0).all())
    # The first of the equals is anywhere among them: its mean place is near the middle.
    assert 6 < float(found[:, 0].double().mean()) < 11


def test_deletion_falls_at_once_where_the_map_is_right(one_patch: DualEncoder) -> None:
    """With the true patch ranked first the similarity is that of a bare image from the first step on; ranked last it
    stays whole until the end."""
    images, _ = images_and_texts(5, 32, 3)
    texts = one_patch.encode_image(images)
    right = torch.zeros(5, 8, 8)
    right[:, ROW, COLUMN] = 1
    first, last = deletion(one_patch, images, texts, right), deletion(one_patch, images, texts, -right)
    np.testing.assert_allclose(first[:, 0], 1, atol=1e-6)
    np.testing.assert_allclose(first[:, 1:], np.broadcast_to(first[:, -1:], (5, STEPS)), atol=1e-6)
    np.testing.assert_allclose(last[:, :-1], 1, atol=1e-6)
    np.testing.assert_allclose(first[:, -1], last[:, -1], atol=1e-6)
    assert bool((first[:, -1] < 0.99).all())


def test_a_right_method_beats_random_order(one_patch: DualEncoder) -> None:
    """The whole test of a method that is exact on its tower: below random order with certainty, and all is reported."""
    images, _ = images_and_texts(20, 32, 3)
    texts = one_patch.encode_image(images)
    found = sanity(one_patch, images, texts, ["occlusion"])
    assert set(found.curves) == {"occlusion", RANDOM, CONTRAST}
    assert found.curves["occlusion"].below_random_interval[0] > 0
    assert found.curves[RANDOM].below_random == 0
    assert len(found.fractions) == len(found.curves["occlusion"].mean) == STEPS + 1
    # This toy has no weights that could be shuffled: its maps are the same, which the test must show.
    assert found.shuffled["occlusion"].correlation == pytest.approx(1)
    assert "occlusion" in found.text()


def test_rank_correlation_is_scipys() -> None:
    """Spearman's coefficient with ties, against SciPy; a flat map correlates with nothing."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(0, 5, (6, 4, 4), generator=generator).float()
    second = torch.randint(0, 5, (6, 4, 4), generator=generator).float()
    expected = [spearmanr(a.flatten(), b.flatten()).statistic for a, b in zip(first, second, strict=True)]
    np.testing.assert_allclose(rank_correlations(first, second), expected, atol=1e-12)
    assert rank_correlations(torch.ones(1, 4, 4), second[:1]).tolist() == [0.0]


def test_maps_of_any_grid_are_compared_on_one() -> None:
    """Finer maps are averaged, coarser ones interpolated; a flat map stays flat."""
    assert torch.equal(on_cells(torch.ones(2, 16, 16), 8), torch.ones(2, 8, 8))
    assert torch.equal(on_cells(torch.ones(2, 2, 2), 8), torch.ones(2, 8, 8))
    fine = torch.zeros(1, 16, 16)
    fine[0, 4:6, 10:12] = 1
    assert int(on_cells(fine, 8).flatten().argmax()) == 2 * 8 + 5


def test_contrast_is_what_differs_from_the_border() -> None:
    """A dark square on white stands out where it is."""
    images = torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)
    images[:, :, 8:12, 20:24] = 0
    found = contrast(images)
    assert found[0, 2, 5] == 255
    assert found.sum() == 255
