"""Which weights a step leaves without a gradient."""

from typing import Any

import pytest
import torch

from mmssl.config import ObjectiveConfig
from mmssl.distributed import World
from mmssl.models.batch_norm import has_local_statistics, synchronize_batch_norm
from mmssl.train.parallel import is_intermittent, without_gradient
from tests.helpers.objective_batch import RESNET, Plain, tiny_task


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, False),
        ({"weight": 0.1}, False),
        ({"start": 0.2}, True),
        ({"end": 0.8}, True),
        ({"ramp": 0.1}, True),
        ({"every": 2}, True),
    ],
)
def test_an_objective_rests_where_its_schedule_says_so(changes: dict[str, Any], expected: bool) -> None:
    """Each part of a schedule by itself; a ramp has weight 0 at the first step."""
    assert is_intermittent(ObjectiveConfig(**changes)) == expected


def test_weights_that_no_objective_reaches_are_found() -> None:
    """Rotation alone reads no captions; with contrastive all is reached, but for a weight that the tower's forward does
    not use. The mixer, its gradients and its queues stay as they are."""
    accelerator: Any = Plain()
    task = tiny_task(["rotation", "contrastive", "moco"])
    before = {name: tensor.clone() for name, tensor in task.state_dict().items()}
    alone = without_gradient(task, {"rotation": 1.0}, accelerator)
    assert any(name.startswith("encoder.text.") for name in alone)
    assert not any(name.startswith("encoder.vision.") for name in alone)
    mix = {"rotation": 1.0, "contrastive": 1.0, "moco": 1.0}
    assert without_gradient(task, mix, accelerator) == []
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.state_dict().items())
    assert all(parameter.grad is None for parameter in task.parameters())
    task = tiny_task(["contrastive"])
    task.encoder.text.idle = torch.nn.Linear(2, 2, bias=False)
    assert without_gradient(task, {"contrastive": 1.0}, accelerator) == ["encoder.text.idle.weight"]


def test_batch_norms_of_one_process_are_told_from_synchronised_ones() -> None:
    """Of two dimensions they are synchronised; those of one, which some towers have, are not."""
    task = tiny_task(["rotation"], RESNET)
    assert has_local_statistics(task)
    synchronize_batch_norm(task, World(), torch.device("cpu"))
    assert not has_local_statistics(task)
    task.encoder.vision.trunk.norm = torch.nn.BatchNorm1d(4)
    assert has_local_statistics(task)
