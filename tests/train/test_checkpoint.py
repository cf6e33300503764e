"""A checkpoint is whole or not there, comes back as it was, and says what is wrong with it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mmssl.errors import UserError
from mmssl.train.checkpoint import (
    list_checkpoints,
    load_checkpoint,
    load_model_state,
    load_optimizer_tensors,
    newest_checkpoint,
    optimizer_tensors,
    prune_checkpoints,
    save_checkpoint,
)


def save(folder: Path, step: int) -> Path:
    return save_checkpoint(
        folder,
        step,
        {"w": torch.full((3,), float(step))},
        {"w/exp_avg": torch.ones(3)},
        {"stream": {"depth": step}},
    )


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    """Tensors and state are equal after a round trip, and no file in it is a pickle."""
    path = save(tmp_path, 7)
    model, optimizer, state = load_checkpoint(path)
    assert torch.equal(model["w"], torch.full((3,), 7.0))
    assert torch.equal(optimizer["w/exp_avg"], torch.ones(3))
    assert (state["step"], state["stream"]) == (7, {"depth": 7})
    assert {p.suffix for p in path.iterdir()} == {".safetensors", ".json"}


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "delete"])
def test_a_damaged_newest_checkpoint_is_passed_over_by_name(tmp_path: Path, name: str, damage: str) -> None:
    """Truncation, a flipped bit or a missing file in the newest one falls back to the one before, and says so."""
    older, newest = save(tmp_path, 1), save(tmp_path, 2)
    file = newest / name
    data = bytearray(file.read_bytes())
    if damage == "delete":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(data[: len(data) // 2])
    else:
        data[-5 if name != "state.json" else 2] ^= 1
        file.write_bytes(data)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found[0] == older
    assert "step-000000002" in found[1][0]


def test_a_write_that_stopped_half_way_is_not_a_checkpoint(tmp_path: Path) -> None:
    """Leftovers of a killed write are invisible and replaced by the next one."""
    save(tmp_path, 1)
    partial = tmp_path / ".writing-step-000000002"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-000000001"]
    save(tmp_path, 2)
    assert not partial.exists()
    load_checkpoint(tmp_path / "step-000000002")


def test_none_usable_and_none_at_all_differ(tmp_path: Path) -> None:
    """No checkpoint is None (start anew); only damaged ones is an error, never a silent fresh start."""
    assert newest_checkpoint(tmp_path) is None
    (save(tmp_path, 1) / "state.json").unlink()
    with pytest.raises(UserError, match="no usable checkpoint"):
        newest_checkpoint(tmp_path)


def test_pruning_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    """Of five, the last two and the best stay."""
    paths = [save(tmp_path, i) for i in range(1, 6)]
    prune_checkpoints(tmp_path, 9, 2, paths[1])
    assert list_checkpoints(tmp_path) == [paths[1], paths[3], paths[4]]


def test_a_damaged_later_one_is_not_counted_as_kept(tmp_path: Path) -> None:
    """A run that passed over step 8 and went on from 6 keeps what it writes at 7, even where one is kept."""
    paths = [save(tmp_path, step) for step in (6, 7, 8)]
    (paths[2] / "model.safetensors").unlink()
    prune_checkpoints(tmp_path, 7, 1, None)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found[0] == paths[1]
    assert not paths[0].exists()


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    """A checkpoint of another format says which one this version reads."""
    path = save(tmp_path, 1)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, "format": 99}))
    with pytest.raises(UserError, match="format 99"):
        load_checkpoint(path)


def test_another_architecture_says_what_differs(tmp_path: Path) -> None:
    """Missing, left-over and reshaped weights are each named."""
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    state = {
        "0.weight": torch.zeros(3, 4),
        "0.bias": torch.zeros(3),
        "1.weight": torch.zeros(1, 3),
        "2.bias": torch.zeros(1),
    }
    with pytest.raises(
        UserError,
        match=r"3 differences: missing 1.bias; left over 2.bias; 0.weight is \(3, 4\), not \(3, 2\)",
    ):
        load_model_state(module.state_dict(), state, "checkpoint x")
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")


def test_the_optimizer_goes_on_bit_for_bit() -> None:
    """Two steps, a round trip into a fresh optimizer, and two more equal four steps; unknown names are refused."""

    def fresh() -> tuple[nn.Linear, torch.optim.AdamW]:
        torch.manual_seed(0)
        module = nn.Linear(3, 2)
        return module, torch.optim.AdamW(module.parameters(), fused=True)

    def steps(module: nn.Linear, optimizer: torch.optim.AdamW, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            module(torch.ones(1, 3)).square().sum().backward()
            optimizer.step()

    whole, optimizer = fresh()
    steps(whole, optimizer, 4)
    first, optimizer = fresh()
    steps(first, optimizer, 2)
    kept = optimizer_tensors(optimizer, {p: n for n, p in first.named_parameters()})
    second, optimizer = fresh()
    second.load_state_dict(first.state_dict())
    load_optimizer_tensors(optimizer, dict(second.named_parameters()), kept)
    steps(second, optimizer, 2)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))
    with pytest.raises(UserError, match="bias2"):
        load_optimizer_tensors(optimizer, {}, {"bias2/exp_avg": torch.zeros(2)})
