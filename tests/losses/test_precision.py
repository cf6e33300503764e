"""The number format of losses."""

import pytest
import torch

from mmssl.losses.precision import in_float32


@in_float32
def _product(a: torch.Tensor, b: torch.Tensor, *, twice: bool = False) -> torch.Tensor:
    """Not a loss."""
    return a @ b * (2 if twice else 1)


@pytest.mark.parametrize(
    ("given", "computed"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_sixteen_bits_widen_and_others_stay(given: torch.dtype, computed: torch.dtype) -> None:
    """Positional and named tensors alike, with autocast on outside; what is no tensor passes through."""
    x = torch.full((2, 2), 1.5, dtype=given)
    with torch.autocast("cpu", torch.bfloat16):
        assert _product(x, b=x, twice=True).dtype == computed
        assert (x.float() @ x.float()).dtype == torch.bfloat16
    assert _product(x, b=x, twice=True)[0, 0] == 9


def test_integers_are_left_alone() -> None:
    """Token ids are no features."""
    total = in_float32(lambda ids, x: x[ids])(torch.tensor([1]), torch.tensor([1.0, 2.0]))
    assert total.item() == 2


def test_keeps_the_functions_name_and_words() -> None:
    """Help shows the loss, not its wrapper."""
    assert _product.__name__ == "_product"
    assert _product.__doc__ == "Not a loss."
