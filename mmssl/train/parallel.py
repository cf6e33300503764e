"""FSDP2 through Accelerate's own configuration: every block of both towers is sharded as a unit of its own.

Weights that a step may leave without a gradient, of which DistributedDataParallel must know.
"""

import copy
from collections.abc import Iterator, Mapping

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from mmssl.config import ObjectiveConfig
from mmssl.errors import UserError
from mmssl.models.batch_norm import has_local_statistics
from mmssl.models.dual_encoder import DualEncoder
from mmssl.objectives._task import TrainingTask
from mmssl.train.cost import synthetic_batch
from mmssl.train.step import backward


def prepare_sharding(accelerator: Accelerator, task: TrainingTask) -> None:
    """Complete what `accelerate launch` was told of FSDP2, before `accelerator.prepare`.

    Weights stay in float32 and autocast does the casting, as without FSDP2: a temperature in bfloat16 would be off by
    a percent. Units are the towers' blocks, unless the launcher names a policy.

    Raises:
        UserError: FSDP version 1 or DeepSpeed was asked for, or an objective cannot be trained so.
    """
    if accelerator.distributed_type == "DEEPSPEED":
        raise UserError(
            "DeepSpeed hides weights and optimizer in its own pickled checkpoints; use FSDP2, which shards as ZeRO-3 "
            "does: accelerate launch --use_fsdp --fsdp_version 2"
        )
    if accelerator.distributed_type != "FSDP":
        return
    if not accelerator.is_fsdp2:
        raise UserError("FSDP version 1 is not supported; use: accelerate launch --use_fsdp --fsdp_version 2")
    for name in task.objectives:
        if task.objective(name).has_own_encoder:
            raise UserError(
                f"objectives.{name} runs an encoder beside the forward pass, where FSDP2 has its weights in parts; "
                f"leave the objective or --use_fsdp out"
            )
    plugin = accelerator.state.fsdp_plugin
    plugin.mixed_precision_policy = None
    # FSDP2 splits weights along their memory.
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
    """Make vectors of one element of scalar parameters, in place: FSDP2 refuses scalars."""
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


PAIRS = 2
TOKENS = 8


def configure_ddp(accelerator: Accelerator, task: TrainingTask, schedules: Mapping[str, ObjectiveConfig]) -> None:
    """Complete the arguments of DistributedDataParallel, before `accelerator.prepare`.

    It looks for weights without a gradient only where there may be some: the search walks the whole graph at every
    step. It sends buffers from process 0 only where processes may hold different ones: queues may be as large as the
    model.
    """
    if task.world.size == 1 or accelerator.distributed_type == "FSDP":
        return
    handler = accelerator.ddp_handler
    assert handler is not None
    handler.broadcast_buffers = has_local_statistics(task)
    acting = {name: schedule for name, schedule in schedules.items() if schedule.weight > 0}
    handler.find_unused_parameters = any(map(is_intermittent, acting.values())) or bool(
        without_gradient(task, {name: schedule.weight for name, schedule in acting.items()}, accelerator)
    )


def is_intermittent(schedule: ObjectiveConfig) -> bool:
    """Whether there are steps at which an objective does not act; a ramp begins at weight 0."""
    return schedule.start > 0 or schedule.end < 1 or schedule.ramp > 0 or schedule.every > 1


def without_gradient(task: TrainingTask, weights: Mapping[str, float], accelerator: Accelerator) -> list[str]:
    """Names of the trained weights that a step leaves without a gradient in which all these objectives act: found by
    one on pairs made up. Towers of other libraries may own weights that their forward does not use."""
    task = copy.deepcopy(task)  # Steps change queues and running statistics.
    batch = synthetic_batch(task, weights, PAIRS, TOKENS)
    backward(task.train(), task, batch, weights, 0.5, (0, "unused"), None, accelerator)
    return [name for name, parameter in task.named_parameters() if parameter.requires_grad and parameter.grad is None]
