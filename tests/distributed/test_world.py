"""Talk between ranks."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mmssl.distributed import World, current_world
from tests.helpers.ranks import on_ranks

SIZES = (2, 0, 3)
MESSAGE = {"step": 3, "words": ["ünï", None, True], "rate": 1e-3}


def _rows(rank: int, size: int) -> torch.Tensor:
    return torch.randn(size, 4, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


def _talk(ranks: World) -> dict[str, Any]:
    """Everything that the tests below look at, in one meeting."""
    said: dict[str, Any] = {}
    for name, size, group in (
        ("uneven", SIZES[ranks.rank], ranks),
        ("even", 2, replace(ranks, equal_batches=True)),
        ("counted even", 2, ranks),
    ):
        rows = _rows(ranks.rank, size).requires_grad_()
        everyone, offset = group.gather(rows)
        ((ranks.rank + 1) * everyone.square()).sum().backward()
        said[name] = {"all": everyone.detach().numpy(), "offset": offset, "gradient": rows.grad.numpy()}
    for name, size, group in (("uneven", SIZES[ranks.rank], ranks), ("even", 2, replace(ranks, equal_batches=True))):
        rows = _rows(ranks.rank, size)
        first = group.ring_shift(rows, rows[:, 0])
        # A second exchange begins before the first has arrived.
        second = group.ring_shift(-rows)
        said[f"{name} passed"] = [x.numpy() for x in (*first(), *second())]
    x = _rows(ranks.rank, 3).mul_(100).requires_grad_()
    result = ranks.logsumexp(x)
    (result * (ranks.rank + 1)).sum().backward()
    said["logsumexp"] = {"value": result.detach().numpy(), "gradient": x.grad.numpy()}
    kept = _rows(ranks.rank, 3).T
    said["sum"] = ranks.sum(kept).numpy()
    said["kept"] = kept.numpy()
    said["ids"] = ranks.gather(torch.arange(SIZES[ranks.rank]))[0].tolist()
    said["message"] = ranks.broadcast(MESSAGE if ranks.rank == 2 else f"not from {ranks.rank}", source=2)
    said["nothing"] = ranks.broadcast("" if ranks.rank == 0 else "not this")
    ranks.barrier()
    return said


@pytest.fixture(scope="module")
def talks() -> list[dict[str, Any]]:
    return on_ranks(3, _talk)


@pytest.mark.parametrize("name", ["uneven", "even", "counted even"])
def test_gather_puts_rows_in_rank_order(talks: list[dict[str, Any]], name: str) -> None:
    """Every rank gets all rows in rank order and knows where its own begin, also where a rank has none."""
    sizes = SIZES if name == "uneven" else (2, 2, 2)
    expected = torch.cat([_rows(rank, size) for rank, size in enumerate(sizes)]).numpy()
    for rank, said in enumerate(talks):
        np.testing.assert_array_equal(said[name]["all"], expected)
        assert said[name]["offset"] == sum(sizes[:rank])


@pytest.mark.parametrize("name", ["uneven", "even", "counted even"])
def test_gather_sums_the_gradients_of_all_ranks(talks: list[dict[str, Any]], name: str) -> None:
    """Rank r's loss is (r + 1) * sum(all^2), so that each row's gradient is (1 + 2 + 3) * 2 * row."""
    for rank, said in enumerate(talks):
        size = SIZES[rank] if name == "uneven" else 2
        np.testing.assert_allclose(said[name]["gradient"], 12 * _rows(rank, size).numpy(), rtol=1e-14)


def test_gather_takes_integers(talks: list[dict[str, Any]]) -> None:
    """Sample ids keep their type."""
    assert all(said["ids"] == [0, 1, 0, 1, 2] for said in talks)


@pytest.mark.parametrize("name", ["uneven", "even"])
def test_passing_on_brings_the_next_ranks_rows(talks: list[dict[str, Any]], name: str) -> None:
    """Several tensors at once, the rows of the rank after, the first one's after the last; two exchanges may be under
    way and arrive in order; a rank without rows passes on none."""
    for rank, said in enumerate(talks):
        after = (rank + 1) % 3
        rows = _rows(after, SIZES[after] if name == "uneven" else 2).numpy()
        for found, expected in zip(said[f"{name} passed"], (rows, rows[:, 0], -rows), strict=True):
            np.testing.assert_array_equal(found, expected)


def test_logsumexp_over_ranks(talks: list[dict[str, Any]]) -> None:
    """Agrees with numpy over the stacked ranks; its gradient is the softmax times all gradients' sum."""
    stacked = np.stack([100 * _rows(rank, 3).numpy() for rank in range(3)])
    expected = np.logaddexp.reduce(stacked)
    for rank, said in enumerate(talks):
        np.testing.assert_allclose(said["logsumexp"]["value"], expected, rtol=1e-14)
        np.testing.assert_allclose(
            said["logsumexp"]["gradient"], 6 * np.exp(stacked[rank] - expected), rtol=1e-10, atol=1e-300
        )


def test_sum_over_ranks_leaves_its_argument(talks: list[dict[str, Any]]) -> None:
    """A transposed (non-contiguous) tensor too is summed elementwise, and not written to."""
    parts = [_rows(rank, 3).T.numpy() for rank in range(3)]
    for rank, said in enumerate(talks):
        np.testing.assert_allclose(said["sum"], sum(parts), rtol=1e-14)
        np.testing.assert_array_equal(said["kept"], parts[rank])


def test_broadcast_carries_json(talks: list[dict[str, Any]]) -> None:
    """Every rank gets the source's value, whatever it holds itself; the empty string is a value."""
    assert all(said["message"] == MESSAGE and said["nothing"] == "" for said in talks)


def test_without_a_process_group_there_is_one_rank() -> None:
    """No call needs a process group: one rank gathers itself."""
    alone = current_world()
    rows = torch.randn(3, 2, requires_grad=True)
    assert alone == World(rank=0, size=1)
    for ranks in (alone, World()):
        assert (ranks.rank, ranks.size) == (0, 1)
        everyone, offset = ranks.gather(rows)
        assert everyone is rows
        assert offset == 0
        assert ranks.logsumexp(rows) is rows
        assert ranks.ring_shift(rows, rows)() == (rows, rows)
        total = ranks.sum(rows)
        assert torch.equal(total, rows)
        assert not total.requires_grad
    assert alone.broadcast(MESSAGE) is MESSAGE
    alone.barrier()
