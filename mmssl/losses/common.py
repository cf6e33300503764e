"""The parts that every loss shares: float32 arithmetic, and the mean over all ranks."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from mmssl.distributed import World

P = ParamSpec("P")
R = TypeVar("R")


def in_float32(loss: Callable[P, R]) -> Callable[P, R]:
    """Make `loss` compute with autocast off, its 16-bit tensor arguments as float32 (float64 stays).

    In bfloat16 a logit near 100 has steps of 0.5, more than most gaps between logits. Widening comes before
    any gather inside `loss`, because a gradient summed over ranks in 16 bits would lose its small parts.
    """

    @wraps(loss)
    def widened(*args: P.args, **kwargs: P.kwargs) -> R:
        devices = {x.device.type for x in (*args, *kwargs.values()) if isinstance(x, Tensor)}
        assert len(devices) == 1, f"tensors on several devices: {sorted(devices)}"
        with torch.autocast(devices.pop(), enabled=False):
            wide_args, wide_kwargs = [_widen(x) for x in args], {k: _widen(v) for k, v in kwargs.items()}
            return loss(*wide_args, **wide_kwargs)  # type: ignore[arg-type]

    return widened


def share(total: Tensor, count: Tensor | int, world: World) -> Tensor:
    """This rank's share of the mean over all ranks' items; the mean of the shares over ranks is that mean.

    `total` is the sum over this rank's items and `count` their number. Zero if no rank has an item.
    """
    count = count if isinstance(count, Tensor) else total.new_full((), count)
    return total * (world.size / world.sum(count).clamp(min=1))


def _widen(x: object) -> object:
    return x.float() if isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.float16) else x
