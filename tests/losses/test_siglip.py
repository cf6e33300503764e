"""The pairwise sigmoid loss on one process."""

import math

import pytest
import torch
from open_clip.loss import SigLipLoss
from torch import Tensor

from mmssl.losses import SIGLIP_BIAS, SIGLIP_LOG_SCALE, siglip
from mmssl.losses.logits import Form
from tests.helpers.features import gradients, unit_rows

FORMS = ("plain", "blocked", "auto")


def _scalar(value: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(value, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("batch", "width", "scale", "bias"),
    [(1, 3, 5.0, 0.0), (2, 1, 1.0, 1.0), (37, 16, 10.0, -10.0), (64, 8, 100.0, -12.0)],
)
def test_agrees_with_open_clip(form: Form, batch: int, width: int, scale: float, bias: float) -> None:
    """Value and the gradients of features, scale and bias are those of open_clip's SigLipLoss."""
    inputs = [unit_rows(batch, width, seed=0), unit_rows(batch, width, seed=1), _scalar(scale), _scalar(bias)]
    ours, theirs = siglip(*inputs, form=form), SigLipLoss()(*inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(ours, inputs), gradients(theirs, inputs), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_agrees_with_the_definition_as_loops(form: Form) -> None:
    """The sum over all pairs of -log sigmoid(+-logit), divided by the number of true pairs."""
    image, text = unit_rows(5, 4, seed=2).detach(), unit_rows(5, 4, seed=3).detach()
    total = 0.0
    for i in range(5):
        for j in range(5):
            logit = 7.0 * float(image[i] @ text[j]) - 2.0
            total += math.log1p(math.exp(-logit if i == j else logit))
    found = siglip(image, text, _scalar(7.0), _scalar(-2.0), form=form)
    assert found.item() == pytest.approx(total / 5, rel=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_starts_as_the_paper_does(form: Form) -> None:
    """exp(t0) = 10, b0 = -10: orthogonal pairs cost ln(1 + e^10) if true and ln(1 + e^-10) if not."""
    assert math.exp(SIGLIP_LOG_SCALE) == pytest.approx(10)
    assert SIGLIP_BIAS == -10
    first, second = torch.eye(16, dtype=torch.float64).split(8)
    loss = siglip(first, second, _scalar(SIGLIP_LOG_SCALE).exp(), _scalar(SIGLIP_BIAS), form=form)
    expected = math.log1p(math.exp(10)) + 7 * math.log1p(math.exp(-10))
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_computes_in_float32_under_autocast(form: Form) -> None:
    """bfloat16 features under autocast give the float32 loss of the same features."""
    image, text = (unit_rows(32, 16, seed=s, dtype=torch.bfloat16) for s in (0, 1))
    scalars = _scalar(30.0, torch.float32), _scalar(-10.0, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = siglip(image, text, *scalars, form=form)
    expected = siglip(image.float(), text.float(), *scalars, form="plain")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
