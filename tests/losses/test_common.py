"""Number format of losses, and shares of a mean over all ranks' items."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from mmssl.distributed import World
from mmssl.losses.common import in_float32, share


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


@dataclass(frozen=True)
class _Group:
    """Rank `rank` of a group whose ranks hold `counts` items."""

    rank: int
    counts: tuple[int, ...]

    @property
    def size(self) -> int:
        return len(self.counts)

    def gather(self, rows: Tensor) -> tuple[Tensor, int]:
        raise AssertionError("a share needs no features")

    def logsumexp(self, x: Tensor) -> Tensor:
        raise AssertionError("a share needs no features")

    def sum(self, x: Tensor) -> Tensor:
        assert x.item() == self.counts[self.rank]
        return torch.full_like(x, sum(self.counts))


def test_the_mean_of_the_shares_is_the_mean_of_all_items() -> None:
    """Also where the ranks hold different numbers of items, or none."""
    items = [torch.tensor([1.0, 2.0, 6.0]), torch.tensor([]), torch.tensor([7.0])]
    counts = tuple(len(part) for part in items)
    for as_tensor in (False, True):
        shares = [
            share(part.sum(), torch.tensor(float(len(part))) if as_tensor else len(part), _Group(rank, counts))
            for rank, part in enumerate(items)
        ]
        torch.testing.assert_close(torch.stack(shares).mean(), torch.cat(items).mean())


def test_nothing_anywhere_is_zero() -> None:
    """No item on any rank: a share of zero, with a gradient of zero."""
    x = torch.ones(3, requires_grad=True)
    value = share((0 * x).sum(), torch.tensor(0.0), World())
    value.backward()
    assert value.item() == 0
    assert torch.equal(x.grad, torch.zeros(3))
