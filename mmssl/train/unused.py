"""Weights that a step may leave without a gradient, of which DistributedDataParallel must know."""

import copy
from collections.abc import Mapping

from accelerate import Accelerator

from mmssl.config import ObjectiveConfig
from mmssl.cost import synthetic_batch
from mmssl.models.batch_norm import has_local_statistics
from mmssl.objectives.mixer import Mixer
from mmssl.train.step import backward

PAIRS = 2
TOKENS = 8


def tell_ddp(accelerator: Accelerator, mixer: Mixer, schedules: Mapping[str, ObjectiveConfig]) -> None:
    """Complete the arguments of DistributedDataParallel, before `accelerator.prepare`.

    It looks for weights without a gradient only where there may be some: the search walks the whole graph at every
    step. It sends buffers from process 0 only where processes may hold different ones: queues may be as large as the
    model.
    """
    if mixer.processes.world == 1 or accelerator.distributed_type == "FSDP":
        return
    handler = accelerator.ddp_handler
    assert handler is not None
    handler.broadcast_buffers = has_local_statistics(mixer)
    acting = {name: schedule for name, schedule in schedules.items() if schedule.weight > 0}
    handler.find_unused_parameters = any(map(rests, acting.values())) or bool(
        without_gradient(mixer, {name: schedule.weight for name, schedule in acting.items()}, accelerator)
    )


def rests(schedule: ObjectiveConfig) -> bool:
    """Whether there are steps at which an objective does not act; a ramp begins at weight 0."""
    return schedule.start > 0 or schedule.end < 1 or schedule.ramp > 0 or schedule.every > 1


def without_gradient(mixer: Mixer, weights: Mapping[str, float], accelerator: Accelerator) -> list[str]:
    """Names of the trained weights that a step leaves without a gradient in which all these objectives act: found by
    one on pairs made up. Towers of other libraries may own weights that their forward does not use."""
    mixer = copy.deepcopy(mixer)  # Steps change queues and running statistics.
    batch = synthetic_batch(mixer, weights, PAIRS, TOKENS)
    backward(mixer.train(), mixer, batch, weights, 0.5, (0, "unused"), None, accelerator)
    return [name for name, parameter in mixer.named_parameters() if parameter.requires_grad and parameter.grad is None]
