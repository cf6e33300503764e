"""FSDP2 changes where weights lie, and nothing else."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn
from torch.distributed.fsdp import FSDPModule

from mmssl.config import ModelConfig, OptimConfig, VisionConfig
from mmssl.data import TrainLoader
from mmssl.distributed import FolderLock, World, full_tensor, local_tensor
from mmssl.errors import UserError
from mmssl.models import build_dual_encoder
from mmssl.objectives import find_objective, objective_names
from mmssl.objectives._base import Vocabulary
from mmssl.objectives._mixing import TrainingTask
from mmssl.train.checkpoint import load_checkpoint
from mmssl.train.optim import Ema, build_optimizer, update
from mmssl.train.parallel import block_classes, prepare_sharding
from mmssl.train.state import RunState, Trained, restore, save
from mmssl.train.step import Step, backward
from tests.helpers import objective_batch as problem
from tests.helpers.models import tiny_model_config
from tests.helpers.ranks import on_ranks
from tests.train.test_step import ROWS, assert_same, batch, by_hand

OPEN_CLIP = VisionConfig(
    name="open_clip:ViT-B-32",
    image_size=16,
    options={"layers": 2, "width": 32, "head_width": 16, "patch_size": 4},
)


def model_config(vision: str) -> ModelConfig:
    config = tiny_model_config(0.3, 0.3)
    return config if vision == "timm" else config.model_copy(update={"vision": OPEN_CLIP})


def task(vision: str, world: World) -> TrainingTask:
    torch.manual_seed(0)
    encoder = build_dual_encoder(model_config(vision), 100, 0)
    kind = find_objective("contrastive")
    vocabulary = Vocabulary(100, 4, (0, 1, 2, 3, 4), torch.zeros(100, dtype=torch.bool), 77)
    return TrainingTask(encoder, {"contrastive": kind(kind.Options(), encoder, vocabulary)}, world).train()


class Sharded:
    """What the step and the update ask of Accelerate under FSDP2, which it does not offer on CPUs."""

    distributed_type, is_fsdp2, mixed_precision, scaler = "FSDP", True, "no", None
    device, torch_device_mesh, is_main_process = torch.device("cpu"), None, True

    def __init__(self) -> None:
        self.state = SimpleNamespace(fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2))

    @contextmanager
    def no_sync(self, model: Any) -> Iterator[None]:
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)

    @contextmanager
    def autocast(self) -> Iterator[None]:
        yield

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def unscale_gradients(self) -> None:
        pass

    def clip_grad_norm_(self, parameters: Iterator[nn.Parameter], limit: float) -> torch.Tensor:
        return torch.nn.utils.clip_grad_norm_(parameters, limit)


def shard(module: TrainingTask, accelerator: Sharded) -> nn.Module:
    """As Accelerate's `prepare` does, with its own code."""
    prepare_sharding(accelerator, module)
    model: nn.Module = fsdp2_prepare_model(accelerator, module)
    return model


def one_step(module: TrainingTask, model: nn.Module, accelerator: Any, step: int, micro_batch: int | None) -> None:
    rows = ROWS // module.world.size
    mine = batch().slice(module.world.rank * rows, (module.world.rank + 1) * rows)
    backward(model, Step(module, mine, {"contrastive": 1.0}, 0.5, (1, "step", step), micro_batch), accelerator)


CASES = [("timm", None), ("timm", 2), ("timm", 5), ("open_clip", 2)]
"""Vision tower and micro-batch."""


def gradients_on_one_rank(world: World) -> list[tuple[int, dict[str, Any]]]:
    return [sharded_gradients(world, *case) for case in CASES]


def sharded_gradients(world: World, vision: str, micro_batch: int | None) -> tuple[int, dict[str, Any]]:
    module, accelerator = task(vision, world), Sharded()
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model = shard(module, accelerator)
    one_step(module, model, accelerator, 2, micro_batch)
    units = sum(isinstance(m, FSDPModule) for m in model.modules())
    halves = [local_tensor(p).numel() for p in module.parameters() if p.numel() > 1]
    assert sum(halves) < 0.6 * sum(p.numel() for p in module.parameters())
    found = {n: full_tensor(p.grad) for n, p in module.named_parameters() if p.grad is not None}
    return units, {n: (g.reshape(()) if g.shape == (1,) else g).numpy() for n, g in found.items()}


def test_the_sharded_gradient_is_that_of_one_process() -> None:
    """Two processes, dropout and drop-path on, whole or with micro-batches and a leftover, weights laid out as the run
    does: each tower's blocks and the rest are units, each process holds about half of the weights, and every gradient
    is one process's on the whole batch to 1e-5 of its largest entry."""
    rows = ROWS // 2
    ranks = on_ranks(2, gradients_on_one_rank)
    for case, (vision, micro_batch) in enumerate(CASES):
        starts = [rank * rows + a for rank in range(2) for a in range(0, rows, micro_batch or rows)]
        _, expected = by_hand(task(vision, World()), starts)
        for found in ranks:
            units, gradients = found[case]
            assert units == 2 + 2 + 1
            assert_same(gradients, expected)


def objectives_on_one_rank(world: World, names: list[str]) -> dict[str, dict[str, np.ndarray]]:
    """Each objective's gradient at its second step, so that what it keeps of the first one counts."""
    found = {}
    for name in names:
        module, accelerator = problem.tiny_task([name], world=world), Sharded()
        model = shard(module, accelerator)
        for step in range(2):
            module.zero_grad()
            mine = problem.part(problem.batch(module, step), world)
            backward(model, Step(module, mine, {name: 1.0}, 0.5, (0, "step", step), 4), accelerator)
        whole_ones = {n: full_tensor(p.grad) for n, p in module.named_parameters() if p.grad is not None}
        found[name] = {n: gradient.flatten().numpy() for n, gradient in whole_ones.items()}
    return found


def test_every_objectives_gradient_is_that_of_one_process() -> None:
    """Of all objectives that can be sharded, with two processes and a leftover micro-batch: to 1e-5 of each largest
    entry."""
    names = [name for name in objective_names() if not find_objective(name).has_own_encoder]
    found = on_ranks(2, objectives_on_one_rank, names)[0]
    for name in names:
        module = problem.tiny_task([name])
        for step in range(2):
            module.zero_grad()
            given = problem.batch(module, step)
            backward(module, Step(module, given, {name: 1.0}, 0.5, (0, "step", step)), problem.Plain())
        expected = {n: p.grad.flatten() for n, p in module.named_parameters() if p.grad is not None}
        assert_same(found[name], expected)


def trained(module: TrainingTask, optimizer: torch.optim.Optimizer, step: int) -> Trained:
    class Nowhere(TrainLoader):
        def __init__(self) -> None: ...

        def state_dict(self) -> dict[str, int | str]:
            return {}

        def load_state_dict(self, state: Any) -> None: ...

    return Trained(module, optimizer, Ema(module.encoder, 0.9), Nowhere(), None, RunState(step=step))


def updates(
    module: TrainingTask, model: nn.Module, accelerator: Any, folder: Path | None, restored: Path | None
) -> Trained:
    """Two updates with clipping and an EMA, from the beginning or from a checkpoint; saved if `folder` is given."""
    optimizer = build_optimizer(module.named_parameters(), OptimConfig())
    live = trained(module, optimizer, 2)
    if restored is not None:
        restore(restored, live)
    for step in (0, 1):
        one_step(module, model, accelerator, step, None)
        norm = update(accelerator, module, optimizer, optimizer, 0.5)
        assert live.ema is not None
        live.ema.update(module.encoder, step, torch.isfinite(norm))
    if folder is not None:
        folder.mkdir(exist_ok=True)
        lock = FolderLock(folder)
        if module.world.rank == 0:
            lock.acquire()
        save(folder, live, lock)
        lock.release()
    return live


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name].reshape(tensor.shape), tensor, atol=2e-6, rtol=1e-4, err_msg=name)


class Whole(Sharded):
    """One process, nothing sharded."""

    @contextmanager
    def no_sync(self, model: Any) -> Iterator[None]:
        yield


def test_sharded_updates_and_checkpoints_are_those_of_one_process(tmp_path: Path) -> None:
    """Two updates (clipped, fused AdamW, EMA) of two processes that drop out nothing, saved: weights, moments and EMA
    are those of one process; and either goes on from the other's checkpoint."""
    torch.manual_seed(0)
    alone = task("timm", World()).eval()
    updates(alone, alone, Whole(), tmp_path / "one", None)
    on_ranks(2, updates_without_dropout, str(tmp_path / "two"), None)
    one, two = (load_checkpoint(tmp_path / name / "step-000000002") for name in ("one", "two"))
    close(two[0], one[0])
    close(two[1], one[1])
    again = task("timm", World()).eval()
    updates(again, again, Whole(), tmp_path / "one-on", tmp_path / "two" / "step-000000002")
    on_ranks(2, updates_without_dropout, str(tmp_path / "two-on"), str(tmp_path / "one" / "step-000000002"))
    before = one[0]
    one, two = (load_checkpoint(tmp_path / name / "step-000000002") for name in ("one-on", "two-on"))
    close(two[0], one[0])
    assert sum(torch.equal(tensor, before[name]) for name, tensor in one[0].items()) < len(before) / 4


def updates_without_dropout(world: World, folder: str, restored: str | None) -> None:
    module, accelerator = task("timm", world).eval(), Sharded()
    model = shard(module, accelerator)
    updates(module, model, accelerator, Path(folder), None if restored is None else Path(restored))


@pytest.mark.parametrize(
    ("vision", "classes"),
    [
        (VisionConfig(name="timm:vit_tiny_patch16_224", options={"depth": 2}), ["Block", "BertLayer"]),
        (VisionConfig(name="timm:resnet10t"), ["BertLayer"]),
        (OPEN_CLIP, ["ResidualAttentionBlock", "BertLayer"]),
    ],
)
def test_blocks_are_found_in_every_librarys_towers(vision: VisionConfig, classes: list[str]) -> None:
    """The class that a tower repeats most is its block; ResNets of one block a stage are sharded as a whole."""
    encoder = build_dual_encoder(tiny_model_config().model_copy(update={"vision": vision}), 100, 0)
    assert [
        name for name in block_classes(encoder) if name in ("Block", "BertLayer", "ResidualAttentionBlock")
    ] == classes


def test_what_cannot_be_sharded_is_refused() -> None:
    """DeepSpeed and FSDP version 1 end with the line to use instead."""
    for kind, version in (("DEEPSPEED", 2), ("FSDP", 1)):
        accelerator = SimpleNamespace(distributed_type=kind, is_fsdp2=version == 2)
        with pytest.raises(UserError, match="--fsdp_version 2"):
            prepare_sharding(accelerator, task("timm", World()))


def test_an_encoder_beside_the_forward_is_refused() -> None:
    """FSDP2 gathers weights in the forward of what it wraps alone."""
    accelerator: Any = Sharded()
    with pytest.raises(UserError, match="objectives.moco runs an encoder outside the forward pass"):
        prepare_sharding(accelerator, problem.tiny_task(["contrastive", "moco"]))
