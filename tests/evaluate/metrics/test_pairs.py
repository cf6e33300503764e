"""Hard pairs against the loops of the papers."""

import itertools

import pytest
import torch

from mmssl.evaluate.metrics import pairs


def winoground(c0i0: float, c0i1: float, c1i0: float, c1i1: float) -> dict[str, bool]:
    """The scores of one group as Winoground's own notebook computes them."""
    text = c0i0 > c1i0 and c1i1 > c0i1
    image = c0i0 > c0i1 and c1i1 > c1i0
    return {"text_score": text, "image_score": image, "group_score": text and image}


def test_group_scores_are_winogrounds() -> None:
    """All three scores are those of the paper's code in every order of four similarities, also with equal ones. Over
    the orders of four different ones the means are the stated chances."""
    groups = list(itertools.product((0.0, 1.0, 2.0, 3.0), repeat=4))
    similarities = torch.tensor(groups).view(-1, 2, 2)
    found = pairs.group_scores(similarities)
    for row, (a, b, c, d) in enumerate(groups):  # image 0: captions 0 and 1; image 1: captions 0 and 1
        expected = winoground(c0i0=a, c0i1=c, c1i0=b, c1i1=d)
        assert {name: bool(score[row]) for name, score in found.items()} == expected
    orders = pairs.group_scores(torch.tensor(list(itertools.permutations((0.0, 1.0, 2.0, 3.0)))).view(-1, 2, 2))
    assert float(orders["text_score"].double().mean()) == pytest.approx(pairs.TEXT_CHANCE)
    assert float(orders["image_score"].double().mean()) == pytest.approx(pairs.TEXT_CHANCE)
    assert float(orders["group_score"].double().mean()) == pytest.approx(pairs.GROUP_CHANCE)


def test_the_right_caption_must_be_above_all_wrong_ones() -> None:
    """With one or more wrong captions per image the outcome is the loop's; equal ones are wrong."""
    own = torch.tensor([0.5, 0.5, 0.2])
    wrong, owner = torch.tensor([0.1, 0.5, 0.3, 0.1]), torch.tensor([0, 1, 2, 2])
    expected = [
        all(float(own[o]) > w for w, p in zip(wrong.tolist(), owner.tolist(), strict=True) if p == o) for o in range(3)
    ]
    assert pairs.right_first(own, wrong, owner).tolist() == expected == [True, False, False]
