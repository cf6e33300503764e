"""The global contrastive loss on one process."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mmssl.losses import UNSEEN, global_contrastive
from mmssl.losses.logits import Form
from tests.helpers.features import gradients, unit_rows

FORMS = ("plain", "blocked", "auto")
SCALE = 7.0


def nothing_known(rows: int) -> Tensor:
    return torch.full((rows, 2), UNSEEN, dtype=torch.float64)


def g_in_loops(image: Tensor, text: Tensor, i: int) -> tuple[Tensor, Tensor]:
    """SogCLR's g of image i and of text i: means over the other pairs of the batch of exp((s_ij - s_ii) / tau)."""
    others = [j for j in range(len(image)) if j != i]
    own = image[i] @ text[i]
    by_image = [torch.exp(SCALE * (image[i] @ text[j] - own)) for j in others]
    by_text = [torch.exp(SCALE * (image[j] @ text[i] - own)) for j in others]
    return torch.stack(by_image).mean(), torch.stack(by_text).mean()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("gamma", "eps"), [(0.9, 1e-14), (0.3, 0.01), (1.0, 0.0)])
def test_agrees_with_the_algorithm_as_loops(form: Form, gamma: float, eps: float) -> None:
    """Over four batches of seven samples, some of them seen again: u is (1 - gamma) u + gamma g, and g at the first
    sight; the loss is the mean of log(eps + u) over images and texts, and its gradient that of g / (eps + u) with u
    held fixed (algorithm 1 of SogCLR and of FastCLIP)."""
    u: dict[tuple[int, int], float] = {}
    known = nothing_known(7)
    for step, batch in enumerate([[0, 1, 2, 3], [4, 5, 6, 0], [3, 1, 4, 6], [2, 0, 5, 1]]):
        image, text = unit_rows(4, 5, seed=2 * step), unit_rows(4, 5, seed=2 * step + 1)
        scale = torch.tensor(SCALE, dtype=torch.float64, requires_grad=True)
        ours, newest = global_contrastive(image, text, scale, known[batch], gamma=gamma, eps=eps, form=form)
        value, surrogate = 0.0, torch.zeros((), dtype=torch.float64)
        for i, sample in enumerate(batch):
            for side, g in enumerate(g_in_loops(image, text, i)):
                before = u.get((sample, side))
                now = float(g.detach())
                u[sample, side] = now if before is None else (1 - gamma) * before + gamma * now
                value += math.log(eps + u[sample, side]) / 2 / len(batch)
                surrogate = surrogate + g / (eps + u[sample, side]) / 2 / len(batch)
        assert ours.item() == pytest.approx(value, rel=1e-12)
        for found, expected in zip(gradients(ours, [image, text]), gradients(surrogate, [image, text]), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        known[batch] = newest
    for (sample, side), average in u.items():
        assert known[sample, side].exp().item() == pytest.approx(average, rel=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_the_temperature_has_the_gradient_of_the_loops(form: Form) -> None:
    """The gradient for the scale is the sum over all logits of their gradients times the cosines: here by differences
    of g / u with u held fixed."""
    image, text = unit_rows(5, 4, seed=8), unit_rows(5, 4, seed=9)
    scale = torch.tensor(SCALE, dtype=torch.float64, requires_grad=True)
    ours, newest = global_contrastive(image, text, scale, torch.zeros(5, 2, dtype=torch.float64), gamma=0.4, form=form)

    def surrogate(value: float) -> float:
        logits = value * (image @ text.T).detach()
        gaps = (logits - logits.diagonal()[:, None]).exp().fill_diagonal_(0).sum(1) / 4
        gaps_of_texts = (logits.T - logits.diagonal()[:, None]).exp().fill_diagonal_(0).sum(1) / 4
        return float((torch.stack([gaps, gaps_of_texts], 1) / (newest.exp() + 1e-14)).sum() / 2 / 5)

    step = 1e-5
    expected = (surrogate(SCALE + step) - surrogate(SCALE - step)) / (2 * step)
    assert gradients(ours, [scale])[0].item() == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("form", FORMS)
def test_one_batch_alone_is_infonce_without_the_positive(form: Form) -> None:
    """With gamma 1 and eps 0 loss and gradients are those of the log-sum-exp over the other logits, minus the own logit
    and the logarithm of their number (decoupled contrastive loss, arXiv:2110.06848)."""
    image, text = unit_rows(9, 6, seed=0), unit_rows(9, 6, seed=1)
    scale = torch.tensor(SCALE, dtype=torch.float64)
    ours, _ = global_contrastive(image, text, scale, nothing_known(9), gamma=1.0, eps=0.0, form=form)
    logits = scale * image @ text.T
    negatives = logits.masked_fill(torch.eye(9, dtype=torch.bool), -math.inf)
    expected = (negatives.logsumexp(1) + negatives.logsumexp(0)).mean() / 2 - logits.diagonal().mean() - math.log(8)
    torch.testing.assert_close(ours, expected)
    for found, wanted in zip(gradients(ours, [image, text]), gradients(expected, [image, text]), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_averages_of_small_batches_approach_the_sum_over_all_data() -> None:
    """For fixed features of 40 samples and random batches of 4, the averages end near g over all 40 samples (a tenth on
    average), where g of one batch is far from it: the bias of a small batch is gone."""
    image, text = unit_rows(40, 3, seed=4).detach(), unit_rows(40, 3, seed=5).detach()
    scale, known = torch.tensor(2.0, dtype=torch.float64), nothing_known(40)
    rng, alone = np.random.default_rng(0), []
    _, whole = global_contrastive(image, text, scale, nothing_known(40), gamma=1.0)
    for _ in range(300):
        for batch in np.split(rng.permutation(40), 10):
            _, newest = global_contrastive(image[batch], text[batch], scale, known[batch], gamma=0.02)
            alone.append(
                global_contrastive(image[batch], text[batch], scale, nothing_known(4), gamma=1.0)[1] - whole[batch]
            )
            known[batch] = newest
    assert (known - whole).abs().mean() < 0.1
    assert torch.stack(alone).abs().mean() > 0.3


@pytest.mark.parametrize("scale", [100.0, 1e4])
@pytest.mark.parametrize("form", FORMS)
def test_large_logits_do_not_overflow(form: Form, scale: float) -> None:
    """From a scale of 100 on, where exp(logit) is infinite in float32, loss, gradients and estimates are finite."""
    image, text = (unit_rows(8, 4, seed=seed, dtype=torch.float32) for seed in (0, 1))
    known = torch.zeros(8, 2)
    loss, newest = global_contrastive(image, text, torch.tensor(scale), known, gamma=0.5, form=form)
    assert loss.isfinite()
    assert newest.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients(loss, [image, text]))


def test_estimates_survive_a_broken_batch() -> None:
    """A feature that is not a number leaves every estimate as it was."""
    image, text = unit_rows(4, 3, seed=0).detach(), unit_rows(4, 3, seed=1).detach()
    image[2, 0] = math.nan
    known = torch.arange(8, dtype=torch.float64).view(4, 2)
    _, newest = global_contrastive(image, text, torch.tensor(3.0, dtype=torch.float64), known, gamma=0.5)
    assert torch.equal(newest[2], known[2])
    assert newest.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_one_sample_alone_changes_nothing(form: Form) -> None:
    """Without another sample there is no negative: gradients are zero, not NaN."""
    image, text = unit_rows(1, 3, seed=0), unit_rows(1, 3, seed=1)
    scale = torch.tensor(SCALE, dtype=torch.float64)
    loss, _ = global_contrastive(image, text, scale, nothing_known(1), gamma=0.9, form=form)
    assert loss.isfinite()
    assert all(not gradient.any() for gradient in gradients(loss, [image, text]))
