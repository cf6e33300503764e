"""Settings of FSDP2 and DistributedDataParallel that follow from the model and its objectives."""

import copy
from collections.abc import Iterator, Mapping

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from mmssl.config import ObjectiveConfig
from mmssl.errors import UserError
from mmssl.models import DualEncoder, batch_norm
from mmssl.objectives import TrainingTask
from mmssl.train.cost import synthetic_batch
from mmssl.train.step import Step, backward


def prepare_sharding(accelerator: Accelerator, task: TrainingTask) -> None:
    """Complete the FSDP2 settings of `accelerate launch`, before `accelerator.prepare`.

    Weights stay in float32 and autocast does the casting, as without FSDP2: a temperature in bfloat16 would be off by
    a percent. Each block of a tower is a unit, unless the launcher names a policy.

    Raises:
        UserError: the launcher asks for FSDP version 1 or DeepSpeed, or an objective does not work with FSDP2.
    """
    if accelerator.distributed_type == "DEEPSPEED":
        raise UserError(
            "DeepSpeed keeps weights and optimizer in its own pickled checkpoints; use FSDP2, which shards as ZeRO-3 "
            "does: accelerate launch --use_fsdp --fsdp_version 2"
        )
    if accelerator.distributed_type != "FSDP":
        return
    if not accelerator.is_fsdp2:
        raise UserError("FSDP version 1 is not supported; use: accelerate launch --use_fsdp --fsdp_version 2")
    for name in task.names:
        if task.objective(name).has_own_encoder:
            raise UserError(
                f"objectives.{name} runs an encoder outside the forward pass, where FSDP2 keeps its weights sharded; "
                f"leave out the objective or --use_fsdp"
            )
    plugin = accelerator.state.fsdp_plugin
    plugin.mixed_precision_policy = None
    # FSDP2 shards weights along their memory layout.
    task.to(memory_format=torch.contiguous_format)
    if plugin.auto_wrap_policy is None:
        plugin.auto_wrap_policy = transformer_auto_wrap_policy
        plugin.transformer_cls_names_to_wrap = block_classes(task.encoder)
    without_scalars(task)


def block_classes(encoder: DualEncoder) -> list[str]:
    """Class names of the blocks that the towers repeat (open_clip, timm and Hugging Face towers alike)."""
    names = []
    for tower in (encoder.vision, encoder.text):
        repeated = list(_repeated(tower))
        if repeated:
            largest = max(repeated, key=lambda container: sum(p.numel() for p in container.parameters()))
            names.append(type(next(largest.children())).__name__)
    return list(dict.fromkeys(names))


def without_scalars(module: nn.Module) -> None:
    """Turn scalar parameters into vectors of one element, in place: FSDP2 refuses scalars."""
    for child in module.modules():
        for name, parameter in child.named_parameters(recurse=False):
            if parameter.ndim == 0:
                vector: Tensor = parameter.detach().reshape(1)
                setattr(child, name, nn.Parameter(vector, requires_grad=parameter.requires_grad))


def _repeated(tower: nn.Module) -> Iterator[nn.Module]:
    """Lists of two or more modules of one class."""
    for module in tower.modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1:
            kinds = {type(child) for child in module}
            if len(kinds) == 1 and any(True for _ in module.parameters()):
                yield module


def configure_ddp(accelerator: Accelerator, task: TrainingTask, schedules: Mapping[str, ObjectiveConfig]) -> None:
    """Complete the arguments of DistributedDataParallel, before `accelerator.prepare`.

    The search for weights without a gradient walks the whole graph at every step, so it is on only if there may be
    such weights. Buffers, which may be as large as the model, are sent from process 0 only if processes may hold
    different ones.
    """
    if task.world.size == 1 or accelerator.distributed_type == "FSDP":
        return
    handler = accelerator.ddp_handler
    assert handler is not None
    handler.broadcast_buffers = batch_norm.has_local_statistics(task)
    active = {name: schedule for name, schedule in schedules.items() if schedule.weight > 0}
    handler.find_unused_parameters = any(map(is_intermittent, active.values())) or bool(
        without_gradient(task, {name: schedule.weight for name, schedule in active.items()}, accelerator)
    )


def is_intermittent(schedule: ObjectiveConfig) -> bool:
    """True if an objective is inactive at some steps; a ramp begins at weight 0."""
    return schedule.start > 0 or schedule.end < 1 or schedule.ramp > 0 or schedule.every > 1


def without_gradient(task: TrainingTask, weights: Mapping[str, float], accelerator: Accelerator) -> list[str]:
    """Names of the trained weights that get no gradient in a step with all these objectives, found on synthetic pairs.

    Towers of other libraries may own weights that their forward pass does not use.
    """
    task = copy.deepcopy(task)  # Steps change queues and running statistics.
    batch = synthetic_batch(task, weights, samples=2, tokens=8)
    backward(task.train(), Step(task, batch, weights, fraction=0.5, seed=(0, "unused")), accelerator)
    return [name for name, parameter in task.named_parameters() if parameter.requires_grad and parameter.grad is None]
