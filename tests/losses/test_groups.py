"""Positives beyond the diagonal, and smoothed labels, on one process."""

import math
from unittest import mock

import pytest
import torch
from pytorch_metric_learning.losses import SupConLoss
from torch import Tensor
from torch.nn import functional as F

from mmssl.distributed import World
from mmssl.losses import blockwise, info_nce, siglip
from mmssl.losses.logits import Form, correct_matches
from mmssl.types import Groups
from tests.helpers.features import gradients, unit_rows

ROWS, TEXTS = 11, 17
LABELS = torch.tensor([0, 1, 2, 0, 3, 1, 0, 4, 5, 0, 1])
TEXT_LABELS = torch.tensor([0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 0, 0, 4, 5, 5])
BLOCKS = [None, (1, 1), (3, 4), (50, 2)]
"""The plain form, and the blocked one with blocks of these rows and columns."""
ways = pytest.mark.parametrize("block", BLOCKS)


def _inputs(texts: int = ROWS) -> list[Tensor]:
    scalars = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (6.0, -2.0))
    return [unit_rows(ROWS, 5, seed=0), unit_rows(texts, 5, seed=1), *scalars]


def _ours(
    name: str, inputs: list[Tensor], block: tuple[int, int] | None, groups: Groups | None, smoothing: float = 0.0
) -> Tensor:
    form: Form = "plain" if block is None else "blocked"
    with mock.patch.object(blockwise, "block_shape", return_value=block):
        if name == "siglip":
            return siglip(*inputs, form=form, groups=groups)
        return info_nce(*inputs[:3], form=form, groups=groups, label_smoothing=smoothing)


def _assert_same(ours: Tensor, theirs: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(ours, inputs), gradients(theirs, inputs), rtol=1e-9, atol=1e-12)


def _of(labels: Tensor, texts: Tensor | None = None) -> Groups:
    return Groups(labels[:, None], (labels if texts is None else texts)[:, None])


def _masking(labels: Tensor) -> Groups:
    numbers = torch.stack([torch.arange(len(labels)), labels], 1)
    return Groups(numbers, numbers)


@ways
def test_unicl_as_loops(block: tuple[int, int] | None) -> None:
    """UniCL, equation 3: of each image the mean over its positives of -log p, of each text too; then their mean."""
    inputs = _inputs()
    image, text, scale, _ = (x.detach() for x in inputs)
    logit = [[float(scale * i @ t) for t in text] for i in image]
    total = 0.0
    for a in range(ROWS):
        positives = [b for b in range(ROWS) if LABELS[a] == LABELS[b]]
        for b in positives:
            by_image = sum(math.exp(logit[a][k]) for k in range(ROWS))
            by_text = sum(math.exp(logit[k][a]) for k in range(ROWS))
            total -= math.log(math.exp(logit[a][b]) / by_image) / len(positives) / 2
            total -= math.log(math.exp(logit[b][a]) / by_text) / len(positives) / 2
    assert _ours("info_nce", inputs, block, _of(LABELS)).item() == pytest.approx(total / ROWS, rel=1e-12)


@ways
def test_supcon_of_pytorch_metric_learning(block: tuple[int, int] | None) -> None:
    """Values and gradients are those of SupConLoss from images to texts and back."""
    inputs = _inputs()[:2]
    theirs = SupConLoss(temperature=1 / 6)
    both = [theirs(a, LABELS, ref_emb=b, ref_labels=LABELS.clone()) for a, b in (inputs, inputs[::-1])]
    ours = _ours("info_nce", [*inputs, torch.tensor(6.0, dtype=torch.float64)], block, _of(LABELS))
    torch.testing.assert_close(ours, sum(both) / 2, rtol=1e-10, atol=1e-10)
    # SupConLoss normalises inside, so its gradient lacks the part along each feature.
    across = [g - (g * x).sum(1, keepdim=True) * x for g, x in zip(gradients(ours, inputs), inputs, strict=True)]
    torch.testing.assert_close(across, gradients(sum(both) / 2, inputs), rtol=1e-8, atol=1e-10)


@ways
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("texts", [ROWS, TEXTS])
def test_cross_entropy_with_soft_targets(block: tuple[int, int] | None, smoothing: float, texts: int) -> None:
    """Values and gradients are those of F.cross_entropy whose targets are even over the positives, smoothed or not,
    also with more texts than images."""
    inputs, text_labels = _inputs(texts), LABELS if texts == ROWS else TEXT_LABELS
    same = (LABELS[:, None] == text_labels[None]).double()
    logits = inputs[2] * inputs[0] @ inputs[1].T
    sides = (logits, same), (logits.T, same.T)
    theirs = sum(F.cross_entropy(z, s / s.sum(1, keepdim=True), label_smoothing=smoothing) for z, s in sides) / 2
    _assert_same(_ours("info_nce", inputs, block, _of(LABELS, text_labels), smoothing), theirs, inputs[:3])


@ways
def test_smoothing_of_the_diagonal(block: tuple[int, int] | None) -> None:
    """Without groups, label smoothing is that of F.cross_entropy with the numbers of the pairs."""
    inputs, own = _inputs(), torch.arange(ROWS)
    logits = inputs[2] * inputs[0] @ inputs[1].T
    theirs = (
        F.cross_entropy(logits, own, label_smoothing=0.1) + F.cross_entropy(logits.T, own, label_smoothing=0.1)
    ) / 2
    _assert_same(_ours("info_nce", inputs, block, None, 0.1), theirs, inputs[:3])


@ways
def test_masked_pairs_are_no_candidates(block: tuple[int, int] | None) -> None:
    """With two numbers per sample, cross-entropy over the own pair and all pairs of other groups, each by a loop."""
    inputs = _inputs()
    logits = inputs[2] * inputs[0] @ inputs[1].T
    losses = []
    for z in (logits, logits.T):
        for i in range(ROWS):
            kept = [i, *(j for j in range(ROWS) if LABELS[i] != LABELS[j])]
            losses.append(F.cross_entropy(z[i, kept], torch.tensor(0)))
    _assert_same(_ours("info_nce", inputs, block, _masking(LABELS)), torch.stack(losses).mean(), inputs[:3])


@ways
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("texts", [ROWS, TEXTS])
def test_sigmoid_of_all_positives(block: tuple[int, int] | None, masked: bool, texts: int) -> None:
    """SigLIP's loss is binary cross-entropy with a target of 1 for each pair of a group, summed and divided by their
    number; masked pairs weigh nothing."""
    inputs, text_labels = _inputs(texts), LABELS if texts == ROWS else TEXT_LABELS
    same = (LABELS[:, None] == text_labels[None]).double()
    groups, target, weight = _of(LABELS, text_labels), same, torch.ones_like(same)
    if masked:
        if texts != ROWS:
            pytest.skip("masking is about pairs of samples")
        groups, target = _masking(LABELS), torch.eye(ROWS, dtype=torch.float64)
        weight = 1 - same + target
    logits = inputs[2] * inputs[0] @ inputs[1].T + inputs[3]
    theirs = F.binary_cross_entropy_with_logits(logits, target, weight, reduction="sum") / target.sum()
    _assert_same(_ours("siglip", inputs, block, groups), theirs, inputs)


@ways
@pytest.mark.parametrize("name", ["info_nce", "siglip"])
def test_groups_of_one_are_the_diagonal(block: tuple[int, int] | None, name: str) -> None:
    """Where every sample is alone in its group, positives and masks change nothing."""
    inputs, alone = _inputs(), torch.arange(ROWS) * 2**40
    expected = _ours(name, inputs, block, None)
    for groups in (_of(alone), _masking(alone)):
        _assert_same(_ours(name, inputs, block, groups), expected, inputs[: 3 if name == "info_nce" else 4])


def test_any_member_of_the_group_is_a_match() -> None:
    """A row is right if its nearest column is of its group, whether positive or masked."""
    left, right = unit_rows(ROWS, 5, seed=0), unit_rows(ROWS, 5, seed=1)
    nearest = (left @ right.T).argmax(1)
    expected = [bool(LABELS[i] == LABELS[int(j)]) for i, j in enumerate(nearest)]
    assert sum(expected) > sum(int(j) == i for i, j in enumerate(nearest))
    for groups in (_of(LABELS), _masking(LABELS)):
        assert correct_matches(left[:7], right, world=World(), groups=groups).tolist() == expected[:7]
