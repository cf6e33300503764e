"""The number format that losses compute in."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def _widen(x: object) -> object:
    return x.float() if isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.float16) else x


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
