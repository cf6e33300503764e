"""NT-Xent on one process."""

import math

import pytest
import torch
from lightly.loss import NTXentLoss as LightlyNTXent
from pytorch_metric_learning.losses import NTXentLoss as MetricLearningNTXent

from mmssl.losses import nt_xent
from mmssl.losses.logits import Form
from tests.helpers.features import gradients, unit_rows

FORMS = ("plain", "blocked", "auto")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("batch", "width", "temperature"), [(2, 2, 1.0), (9, 5, 0.5), (33, 16, 0.1)])
def test_agrees_with_lightly(form: Form, batch: int, width: int, temperature: float) -> None:
    """Value and gradients of both views."""
    views = [unit_rows(batch, width, seed=0), unit_rows(batch, width, seed=1)]
    ours = nt_xent(*views, temperature, form=form)
    theirs = LightlyNTXent(temperature=temperature)(*views)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    # lightly normalises inside, so its gradient lacks the part along each feature.
    ours_across = [g - (g * v).sum(1, keepdim=True) * v for g, v in zip(gradients(ours, views), views, strict=True)]
    torch.testing.assert_close(ours_across, gradients(theirs, views), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_agrees_with_pytorch_metric_learning(form: Form) -> None:
    """Value, with the two views as one batch whose labels pair them."""
    views = [unit_rows(9, 5, seed=0), unit_rows(9, 5, seed=1)]
    theirs = MetricLearningNTXent(temperature=0.1)(torch.cat(views), torch.arange(9).repeat(2))
    torch.testing.assert_close(nt_xent(*views, form=form), theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_agrees_with_the_paper_as_loops(form: Form) -> None:
    """Algorithm 1: the mean over all 2N views of -log(exp(s_ij) / sum over k != i of exp(s_ik))."""
    first, second = unit_rows(4, 3, seed=2), unit_rows(4, 3, seed=3)
    views = torch.cat([first, second]).detach()
    total = 0.0
    for i in range(8):
        others = sum(math.exp(float(views[i] @ views[k]) / 0.2) for k in range(8) if k != i)
        total -= math.log(math.exp(float(views[i] @ views[(i + 4) % 8]) / 0.2) / others)
    assert nt_xent(first, second, 0.2, form=form).item() == pytest.approx(total / 8, rel=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_one_sample_alone_costs_nothing(form: Form) -> None:
    """A view's only candidate is the right one: loss and gradients are zero, not NaN."""
    views = [unit_rows(1, 3, seed=0), unit_rows(1, 3, seed=1)]
    loss = nt_xent(*views, form=form)
    assert loss.item() == 0
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients(loss, views))


@pytest.mark.parametrize("form", FORMS)
def test_closed_form(form: Form) -> None:
    """Views alike and samples orthogonal: ln(1 + (2N - 2) e^(-1 / temperature))."""
    views = torch.eye(6, dtype=torch.float64)
    expected = math.log1p(10 * math.exp(-2.0))
    assert nt_xent(views, views, 0.5, form=form).item() == pytest.approx(expected, rel=1e-12)
