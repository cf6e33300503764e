"""Regression of masked patches."""

import pytest
import torch
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from mmssl.losses.reconstruction import masked_patches, normalise_patches
from tests.helpers.features import gradients


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("normalised", [False, True])
def test_agrees_with_vit_mae(normalised: bool) -> None:
    """The sum over the count, and its gradient, are those of transformers' ViTMAE with the same mask."""
    config = ViTMAEConfig(
        image_size=16,
        patch_size=4,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        decoder_hidden_size=8,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=8,
        norm_pix_loss=normalised,
    )
    torch.manual_seed(0)
    peer = ViTMAEForPreTraining(config)
    images = torch.rand(2, 3, 16, 16)
    output = peer(images, noise=torch.rand(2, 16))
    # Rows of 4 x 4 patches, each pixel's channels together, as ViTMAE has them.
    target = images.unflatten(2, (4, 4)).unflatten(4, (4, 4)).permute(0, 2, 4, 3, 5, 1).reshape(2, 16, 48)
    target = normalise_patches(target) if normalised else target
    total, count = masked_patches(output.logits, target, output.mask.bool())
    assert count == 24
    torch.testing.assert_close(total / count, output.loss)
    of_ours, of_theirs = (gradients(loss, [output.logits]) for loss in (total / count, output.loss))
    torch.testing.assert_close(of_ours, of_theirs)


def test_only_masked_patches_count() -> None:
    """Predictions of visible patches have neither cost nor gradient."""
    predicted, target = _random(2, 5, 4).requires_grad_(), _random(2, 5, 4, seed=1)
    mask = torch.tensor([[True, False, False, True, False], [False] * 5])
    total, count = masked_patches(predicted, target, mask)
    expected = sum(((predicted[0, i] - target[0, i]) ** 2).mean() for i in (0, 3))
    assert count == 2
    torch.testing.assert_close(total, expected)
    (gradient,) = gradients(total, [predicted])
    assert torch.equal(gradient.abs().sum(-1) > 0, mask)


def test_normalised_patches_have_mean_0_and_unbiased_variance_1() -> None:
    """Each patch by itself; one of a single colour becomes zeros and not NaN."""
    patches = torch.stack([_random(12) * 5 + 3, torch.full((12,), 0.7, dtype=torch.float64)])
    textured, flat = normalise_patches(patches)
    assert textured.mean().item() == pytest.approx(0, abs=1e-12)
    assert textured.var(correction=1).item() == pytest.approx(1, rel=1e-6)
    assert torch.allclose(flat, torch.zeros(12, dtype=torch.float64), atol=1e-9)
