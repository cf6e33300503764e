"""On a GPU no objective makes the host wait: shown on fake tensors, which know shapes and devices and need no GPU."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mmssl.objectives import objective_names
from mmssl.objectives._mixing import TrainingTask, Weighted
from mmssl.rng import RowRandom
from mmssl.train.step import Tally
from tests.helpers.objective_batch import RESNET, ROWS, batch, tiny_task
from tests.objectives.test_pairs import CASES


class Watcher(TorchDispatchMode):
    """Refuses what makes the host wait for the device, or the device for the host."""

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        name = str(function)
        if name.startswith(("aten._to_copy", "aten.copy_")) and not (options or {}).get("non_blocking", False):
            source, target = (arguments[0], result) if name.startswith("aten._to") else (arguments[1], arguments[0])
            assert source.device == target.device, f"{name}: from {source.device} to {target.device}"
        return result


def to_gpu(module: nn.Module) -> None:
    """Give every weight and buffer a stand-in on a GPU."""
    for child in module.modules():
        for name, parameter in list(child.named_parameters(recurse=False)):
            stand_in = nn.Parameter(torch.empty_like(parameter, device="cuda"), requires_grad=parameter.requires_grad)
            setattr(child, name, stand_in)
        for name, buffer in list(child.named_buffers(recurse=False)):
            setattr(child, name, torch.empty_like(buffer, device="cuda"))


class Draws(RowRandom):
    """Without a generator: a GPU's exists on GPUs only."""

    def __init__(self) -> None: ...

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(ROWS, *shape, device="cuda")

    normal = noise = uniform

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, (ROWS, *shape), device="cuda")


def a_step(task: TrainingTask, name: str) -> Tally:
    """All of a step that objectives write: what is drawn and counted, predictions, losses, metrics and queues."""
    given = batch(task).to(torch.device("cuda"))
    inputs = task.inputs(given, [name], lambda _: Draws(), 0.5)
    tally = Tally()
    count = task.objective(name).num_terms(inputs)
    total, outputs = task(inputs, {name: Weighted(1.0, 1 / count)})
    tally.add("total", total, count)
    for metric, (value, terms) in outputs[name].metrics.items():
        tally.add(metric, value, terms)
    task.on_step_end(inputs, [name])
    return tally


@pytest.mark.parametrize("tower", [{}, RESNET], ids=["vit", "resnet"])
@pytest.mark.parametrize("name", objective_names())
def test_the_host_waits_for_nothing(name: str, tower: dict[str, Any]) -> None:
    """No value is read from the device, no shape depends on one, nothing is copied to it but asynchronously, and all
    tensors meet on it."""
    task = tiny_task([name], tower)
    with FakeTensorMode(allow_non_fake_inputs=True), Watcher():
        to_gpu(task)
        for pair in a_step(task, name).sums.values():
            assert pair.device.type == "cuda"


@pytest.mark.parametrize("case", CASES)
def test_pairs_beyond_the_diagonal_wait_for_nothing_either(case: str) -> None:
    """The same for groups of samples, masks, smoothed labels, several images and captions, and shorter embeddings."""
    name, options = CASES[case]
    task = tiny_task([name], options=options)
    with FakeTensorMode(allow_non_fake_inputs=True), Watcher():
        to_gpu(task)
        for pair in a_step(task, name).sums.values():
            assert pair.device.type == "cuda"
