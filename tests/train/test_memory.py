"""`train.micro_batch: auto` finds what fits."""

import pytest
import torch
from accelerate import Accelerator

from mmssl.train.cost import _largest_that_runs, fit_micro_batch, free_memory
from tests.train.test_step import task


def fit(free_bytes: int, rows: int = 256) -> int:
    module = task(0.0)
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    found, _ = fit_micro_batch(module, rows, 8, {"contrastive": 1.0}, Accelerator(cpu=True), free_bytes)
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())
    return found


def test_the_micro_batch_follows_the_memory() -> None:
    """Twice the memory, twice the micro-batch; never more than there are rows, never less than one; powers of two."""
    weights = sum(3 * p.numel() * p.element_size() for p in task(0.0).parameters())
    sizes = [fit(weights + mib * 2**20) for mib in (4, 8, 16)]
    assert sizes[0] in (2, 4, 8, 16, 32, 64)
    assert sizes == [sizes[0], 2 * sizes[0], 4 * sizes[0]]
    assert fit(2**40, rows=12) == 12
    assert fit(0) == 1


def test_a_size_that_runs_out_of_memory_is_halved() -> None:
    """Tried from the estimate down, until it runs; at one there is nothing left to try."""
    tried = []

    def trial(count: int) -> None:
        tried.append(count)
        if count > 8:
            raise torch.OutOfMemoryError

    assert _largest_that_runs(64, trial) == 8
    assert tried == [64, 32, 16, 8]
    assert _largest_that_runs(1, trial) == 1


def test_free_memory_is_shared_by_the_processes_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of four processes may take a quarter."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    quarter = free_memory(torch.device("cpu"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert 3 < free_memory(torch.device("cpu")) / quarter < 5
