"""InfoNCE against a queue."""

import math

import pytest
import torch
from lightly.loss import NTXentLoss

from mmssl.losses import moco
from tests.helpers.features import gradients, unit_rows


def test_agrees_with_lightlys_memory_bank() -> None:
    """The sum over the count, and the query's gradient, with our queue put into lightly's bank."""
    query, key, queue = unit_rows(6, 4, seed=0), unit_rows(6, 4, seed=1), unit_rows(20, 4, seed=2)
    peer = NTXentLoss(temperature=0.2, memory_bank_size=(20, 4))
    peer.memory_bank.bank = queue.detach().clone()
    peer.memory_bank.bank_ptr = torch.zeros(1, dtype=torch.int64)
    theirs = peer(query, key.detach())
    total, count = moco(query, key, queue, 0.2)
    assert count == 6
    torch.testing.assert_close(total / count, theirs, rtol=1e-10, atol=1e-12)
    (ours,) = gradients(total / count, [query])
    # lightly normalises inside, so its gradient lacks the part along each query.
    across = ours - (ours * query).sum(1, keepdim=True) * query
    torch.testing.assert_close([across], gradients(theirs, [query]), rtol=1e-8, atol=1e-10)


def test_agrees_with_the_definition_as_loops() -> None:
    """Each query's candidates are its own key and the queue: not the other queries' keys."""
    query, key, queue = (unit_rows(rows, 4, seed=rows).detach() for rows in (3, 3, 5))
    expected = 0.0
    for i in range(3):
        own = math.exp(float(query[i] @ key[i]) / 0.1)
        expected -= math.log(own / (own + sum(math.exp(float(query[i] @ old) / 0.1) for old in queue)))
    assert moco(query, key, queue, 0.1)[0].item() == pytest.approx(expected, rel=1e-12)


def test_keys_and_queue_get_no_gradient() -> None:
    """The momentum encoder learns by its moving average only."""
    query, key, queue = unit_rows(3, 4, seed=0), unit_rows(3, 4, seed=1), unit_rows(5, 4, seed=2)
    moco(query, key, queue)[0].backward()
    assert query.grad is not None
    assert key.grad is None
    assert queue.grad is None
