"""The blocked forms against the plain matrix of logits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mmssl.losses import blockwise
from mmssl.losses.pairing import LEFT_OUT, Diagonal, Grouped
from mmssl.types import Groups
from tests.helpers.features import gradients, unit_rows

Arguments = tuple[list[Tensor], int, tuple[int, int]]


@st.composite
def arguments(draw: st.DrawFn) -> Arguments:
    """Left [n, D], right [N, D], scale and bias; where the diagonal starts; a block's rows and columns."""
    rows, width = draw(st.integers(1, 9)), draw(st.integers(1, 5))
    offset, after = draw(st.integers(0, 7)), draw(st.integers(0, 7))
    scale, bias = draw(st.floats(0.01, 200)), draw(st.floats(-20, 20))
    seed = draw(st.integers(0, 2**16))
    block = draw(st.integers(1, 10)), draw(st.integers(1, 20))
    sides = unit_rows(rows, width, seed=seed), unit_rows(offset + rows + after, width, seed=seed + 1)
    scalars = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (scale, bias))
    return [*sides, *scalars], offset, block


@settings(max_examples=60, deadline=None)
@given(arguments(), st.booleans())
def test_logsumexps_are_those_of_the_matrix(example: Arguments, without_diagonal: bool) -> None:
    """Rows, columns, diagonal and all gradients, for any size, scale, offset and block, one or many."""
    (left, right, scale, _), offset, block = example
    logits = scale * left @ right.T
    hidden = torch.zeros_like(logits, dtype=torch.bool)
    hidden.diagonal(offset).fill_(without_diagonal)
    summed = logits.masked_fill(hidden, LEFT_OUT)
    expected = summed.logsumexp(1), summed.logsumexp(0), logits.diagonal(offset)
    found = blockwise.logsumexps(left, right, scale, Diagonal(offset, without_diagonal), block=block)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    # Sines weigh every output differently.
    weighted = [sum((x * torch.arange(1.0, len(x) + 1).sin()).sum() for x in xs) for xs in (found, expected)]
    inputs = [left, right, scale]
    torch.testing.assert_close(*(gradients(w, inputs) for w in weighted), rtol=1e-9, atol=1e-10)


@settings(max_examples=60, deadline=None)
@given(arguments())
def test_sigmoid_loss_is_that_of_the_matrix(example: Arguments) -> None:
    """Value and all gradients, for any size, scale, bias, offset and block."""
    (left, right, scale, bias), offset, block = example
    logits = scale * left @ right.T + bias
    signs = torch.full_like(logits, -1)
    signs.diagonal(offset).fill_(1)
    expected = -F.logsigmoid(signs * logits).sum()
    found = blockwise.sigmoid_loss(left, right, scale, bias, Diagonal(offset), block=block)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    inputs = [left, right, scale, bias]
    torch.testing.assert_close(gradients(3 * found, inputs), gradients(3 * expected, inputs), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("block", [(1, 1), (3, 4), (50, 50)])
@pytest.mark.parametrize("without_diagonal", [False, True])
def test_gradients_agree_with_finite_differences(block: tuple[int, int], without_diagonal: bool) -> None:
    """Of every output with respect to every input, in float64, without help from another formula."""
    inputs = (
        unit_rows(5, 3, seed=0),
        unit_rows(9, 3, seed=1),
        torch.tensor(2.0, dtype=torch.float64).requires_grad_(),
    )
    assert torch.autograd.gradcheck(
        lambda *x: blockwise.logsumexps(*x, Diagonal(2, without_diagonal), block=block), inputs
    )
    bias = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: blockwise.sigmoid_loss(*x, Diagonal(2), block=block), (*inputs, bias))


def _info_nce_parts(*inputs: Tensor, pairing: Diagonal | Grouped | None = None) -> Tensor:
    rows, columns, positives = blockwise.logsumexps(*inputs[:3], pairing or Diagonal(), block=(16, 32))
    return (rows + columns - 2 * positives).mean()


def _sigmoid_loss(*inputs: Tensor, pairing: Diagonal | Grouped | None = None) -> Tensor:
    return blockwise.sigmoid_loss(*inputs, pairing or Diagonal(), block=(16, 32)) / len(inputs[0])


BOTH = pytest.mark.parametrize("loss", [_info_nce_parts, _sigmoid_loss])
Loss = Callable[..., Tensor]


@BOTH
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2), (0, 1)])
def test_frozen_inputs_get_no_gradient_and_change_no_other(loss: Loss, wanted: tuple[int, ...]) -> None:
    """A locked tower or a fixed scale costs nothing and leaves the other gradients as they are."""
    inputs = [
        unit_rows(40, 4, seed=0),
        unit_rows(40, 4, seed=1),
        *torch.tensor([9.0, -3.0], dtype=torch.float64),
    ]
    everything = [x.detach().requires_grad_() for x in inputs]
    some = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(inputs)]
    loss(*everything).backward()
    loss(*some).backward()
    for i, (full, partial) in enumerate(zip(everything[:3], some[:3], strict=True)):
        if i in wanted:
            torch.testing.assert_close(partial.grad, full.grad, rtol=1e-12, atol=1e-15)
        else:
            assert partial.grad is None


class _Watch(TorchDispatchMode):
    """Looks at every operation: its size, matrix products, and subnormal numbers in their factors."""

    largest, products, subnormal = 0, 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(function).startswith(("aten.mm.", "aten.addmm_.")):
            self.products += 1
            for factor in args[-2:]:
                size = factor.detach().abs()
                self.subnormal += int(((size > 0) & (size < torch.finfo(size.dtype).tiny)).sum())
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel())
        return result


@BOTH
@pytest.mark.parametrize("grouped", [False, True])
def test_the_matrix_is_never_held(loss: Loss, grouped: bool) -> None:
    """No operation, forward or backward, makes a tensor larger than a batch of features or two blocks, with groups
    neither."""
    inputs = [unit_rows(200, 8, seed=s, dtype=torch.float32) for s in (0, 1)]
    numbers = torch.stack([torch.arange(200), torch.arange(200) % 9], 1)
    pairing = Grouped(Groups(numbers, numbers)) if grouped else None
    with _Watch() as watch:
        loss(*inputs, *torch.tensor([10.0, -10.0]).requires_grad_(), pairing=pairing).backward()
    assert 200 * 8 <= watch.largest < 200 * 200 / 10


@BOTH
def test_a_confident_model_makes_no_subnormal_numbers(loss: Loss) -> None:
    """Image and text features alike at scale 100: probabilities down to e^-200, and no product of subnormals.

    A CPU takes some 20 times longer for those.
    """
    image = unit_rows(100, 64, seed=0, dtype=torch.float32)
    text = image.detach().clone().requires_grad_()
    with _Watch() as watch:
        loss(image, text, *torch.tensor([100.0, -10.0]).requires_grad_()).backward()
    assert watch.products > 0
    assert watch.subnormal == 0


@BOTH
def test_there_is_no_second_derivative(loss: Loss) -> None:
    """A gradient taken with `create_graph` carries no graph: nothing can be silently wrong behind it."""
    inputs = [unit_rows(4, 3, seed=0), unit_rows(4, 3, seed=1), *torch.ones(2, dtype=torch.float64)]
    (gradient,) = torch.autograd.grad(loss(*inputs), inputs[0], create_graph=True)
    assert not gradient.requires_grad


@BOTH
@pytest.mark.parametrize("locked", [0, 1])
def test_a_locked_tower_saves_its_product(loss: Loss, locked: int) -> None:
    """With one side frozen a step makes one product less for each block, and the scale costs none."""
    products = []
    for frozen in (None, locked):
        inputs = [unit_rows(16, 4, seed=s).detach().requires_grad_(s != frozen) for s in (0, 1)]
        with _Watch() as watch:
            loss(*inputs, *torch.ones(2, dtype=torch.float64).requires_grad_()).backward()
        products.append(watch.products)
    assert products[1] == products[0] - 1


def test_no_gradient_is_computed_under_no_grad() -> None:
    """Evaluation of the sigmoid loss makes one product for each block, and training three."""
    inputs = [unit_rows(32, 4, seed=0), unit_rows(32, 4, seed=1)]
    scalars = torch.ones(2, dtype=torch.float64)
    products = []
    for train in (False, True):
        with _Watch() as watch, torch.set_grad_enabled(train):
            blockwise.sigmoid_loss(*inputs, *scalars, Diagonal(), block=(16, 32))
        products.append(watch.products)
    assert products == [2, 6]
