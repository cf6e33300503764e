"""Symmetric InfoNCE on one process."""

import math

import pytest
import torch
from open_clip.loss import ClipLoss
from torch import Tensor

from mmssl.losses import info_nce
from mmssl.losses.logits import Form
from tests.helpers.features import gradients, unit_rows

FORMS = ("plain", "blocked", "auto")


def _scale(value: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(value, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("batch", "width", "scale"), [(1, 3, 5.0), (2, 1, 1.0), (37, 16, 14.3), (64, 8, 100.0)])
def test_agrees_with_open_clip(form: Form, batch: int, width: int, scale: float) -> None:
    """Value and the gradients of both features and the scale are those of open_clip's ClipLoss."""
    inputs = [unit_rows(batch, width, seed=0), unit_rows(batch, width, seed=1), _scale(scale)]
    ours, theirs = info_nce(*inputs, form=form), ClipLoss()(*inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(ours, inputs), gradients(theirs, inputs), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_agrees_with_the_definition_as_loops(form: Form) -> None:
    """The mean over pairs of the two negative log probabilities, written out pair by pair."""
    image, text = unit_rows(6, 4, seed=2).detach(), unit_rows(6, 4, seed=3).detach()
    logit = [[3.0 * float(i @ t) for t in text] for i in image]
    total = 0.0
    for k in range(6):
        by_image = sum(math.exp(logit[k][j]) for j in range(6))
        by_text = sum(math.exp(logit[j][k]) for j in range(6))
        total -= (math.log(math.exp(logit[k][k]) / by_image) + math.log(math.exp(logit[k][k]) / by_text)) / 2
    assert info_nce(image, text, _scale(3.0), form=form).item() == pytest.approx(total / 6, rel=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_closed_forms(form: Form) -> None:
    """Equal features tell nothing: ln N. Orthogonal pairs, each text its image: ln(1 + (N - 1) e^-scale)."""
    same = torch.ones(8, 4, dtype=torch.float64) / 2
    apart = torch.eye(8, dtype=torch.float64)
    assert info_nce(same, same, _scale(50.0), form=form).item() == pytest.approx(math.log(8), rel=1e-12)
    expected = math.log1p(7 * math.exp(-4.0))
    assert info_nce(apart, apart, _scale(4.0), form=form).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_computes_in_float32_under_autocast(form: Form) -> None:
    """bfloat16 features under autocast give the float32 loss of the same features, and bfloat16 gradients."""
    image, text = (unit_rows(32, 16, seed=s, dtype=torch.bfloat16) for s in (0, 1))
    scale = _scale(100.0, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = info_nce(image, text, scale, form=form)
    found = gradients(loss, [image, text, scale])
    wide = [image.detach().float().requires_grad_(), text.detach().float().requires_grad_(), scale]
    expected = info_nce(*wide, form="plain")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert [gradient.dtype for gradient in found] == [torch.bfloat16, torch.bfloat16, torch.float32]
    for gradient, exact in zip(found, gradients(expected, wide), strict=True):
        torch.testing.assert_close(gradient, exact.to(gradient.dtype), rtol=2**-7, atol=1e-6)
