"""Losses of predicted tokens and patches."""

import pytest
import torch
from open_clip.loss import CoCaLoss
from transformers import BertConfig, BertForMaskedLM, ViTMAEConfig, ViTMAEForPreTraining

from mmssl.losses.prediction import NO_TARGET, masked_language, masked_patches, next_token, normalise_patches
from tests.helpers.features import gradients


def _logits(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()


def test_masked_language_agrees_with_bert() -> None:
    """The sum over the count is the loss of transformers' BertForMaskedLM with the same labels."""
    torch.manual_seed(0)
    bert = BertForMaskedLM(
        BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    ).eval()
    tokens, targets = torch.randint(40, (3, 7)), torch.randint(40, (3, 7))
    targets[torch.rand(3, 7) < 0.6] = NO_TARGET
    output = bert(tokens, labels=targets)
    total, count = masked_language(output.logits, targets)
    assert 0 < count < 21
    torch.testing.assert_close(total / count, output.loss)


def test_masked_language_as_loops() -> None:
    """Only positions with a target count, each with its own -log softmax; others get no gradient."""
    logits, targets = _logits(2, 3, 5), torch.tensor([[1, NO_TARGET, 4], [NO_TARGET, NO_TARGET, 0]])
    total, count = masked_language(logits, targets)
    probabilities = logits.softmax(-1)
    expected = -sum(probabilities[where].log() for where in ((0, 0, 1), (0, 2, 4), (1, 2, 0)))
    assert count == 3
    torch.testing.assert_close(total, expected)
    (gradient,) = gradients(total, [logits])
    assert torch.equal(gradient.abs().sum(-1) > 0, targets != NO_TARGET)


def test_no_target_at_all_is_zero_and_not_nan() -> None:
    """A micro-batch without any masked token adds nothing."""
    logits = _logits(2, 3, 5)
    total, count = masked_language(logits, torch.full((2, 3), NO_TARGET))
    assert total.item() == 0
    assert count.item() == 0
    assert torch.equal(*gradients(total, [logits]), torch.zeros_like(logits))


def test_next_token_agrees_with_coca() -> None:
    """The sum over the count, and its gradient, are open_clip's caption loss on shifted logits and labels."""
    logits, tokens = (
        _logits(3, 6, 11),
        torch.randint(1, 11, (3, 6), generator=torch.Generator().manual_seed(0)),
    )
    lengths = torch.tensor([6, 4, 2])
    mask = torch.arange(6) < lengths[:, None]
    padded = tokens.masked_fill(~mask, 0)
    peer = CoCaLoss(caption_loss_weight=1.0, clip_loss_weight=0.0, pad_id=0)
    _, theirs = peer(None, None, logits[:, :-1], padded[:, 1:], None)
    total, count = next_token(logits, tokens, mask)
    assert count == lengths.sum() - 3
    torch.testing.assert_close(total / count, theirs)
    torch.testing.assert_close(gradients(total / count, [logits]), gradients(theirs, [logits]))


def test_next_token_shifts_once() -> None:
    """Logits that name the following token cost nothing; those that name the token itself cost much."""
    tokens = torch.tensor([[3, 1, 4, 2]])
    mask = torch.ones_like(tokens, dtype=torch.bool)
    following = torch.nn.functional.one_hot(tokens.roll(-1, 1), 5) * 50.0
    itself = torch.nn.functional.one_hot(tokens, 5) * 50.0
    assert next_token(following, tokens, mask)[0].item() == pytest.approx(0, abs=1e-6)
    assert next_token(itself, tokens, mask)[0].item() == pytest.approx(150)


def test_parts_add_up_to_the_whole() -> None:
    """Sums and counts of micro-batches add to those of the batch, however targets are spread."""
    logits, targets = (
        _logits(4, 3, 5),
        torch.tensor([[1, 2, 3], [NO_TARGET] * 3, [0, NO_TARGET, 1], [4, 4, NO_TARGET]]),
    )
    whole = torch.stack(masked_language(logits, targets))
    parts = sum(torch.stack(masked_language(logits[i : i + 1], targets[i : i + 1])) for i in range(4))
    torch.testing.assert_close(parts, whole)


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
