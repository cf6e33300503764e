"""The number format of the forward pass, chosen by measuring which one the device multiplies fastest."""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import cache
from typing import Literal, NamedTuple

import torch

Precision = Literal["fp32", "bf16", "fp16"]

DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SIDE = 512
"""Rows and columns of the matrices that are multiplied: a CPU that emulates bf16 takes a quarter of a second."""
SECONDS = 0.05
"""Least time that one format is measured for."""
SLOW = 2.0
"""A format that takes this many times as long as fp32 is emulated."""


class PrecisionChoice(NamedTuple):
    """A precision and the reason for it, in words."""

    precision: Precision
    reason: str


def autocast(device_type: str, precision: Precision) -> AbstractContextManager[object]:
    """A context in which towers compute in this precision; their weights stay as they are."""
    return torch.autocast(device_type, DTYPES[precision], enabled=precision != "fp32")


@cache
def product_milliseconds(device_type: str, precision: Precision) -> float | None:
    """Time of one matrix product, measured once per process. None: the device cannot multiply in this format."""
    device, dtype = torch.device(device_type), DTYPES[precision]
    try:
        left = torch.ones(SIDE, SIDE, device=device, dtype=dtype)
        float((left @ left)[0, 0])  # the first product also loads the kernel
        best, begin = float("inf"), time.perf_counter()
        while best == float("inf") or time.perf_counter() - begin < SECONDS:
            start = time.perf_counter()
            # Reading a number waits for the device.
            float((left @ left)[0, 0])
            best = min(best, time.perf_counter() - start)
    except (RuntimeError, TypeError, NotImplementedError):
        return None
    return 1e3 * best


def choose_precision(
    device_type: str, measure: Callable[[str, Precision], float | None] = product_milliseconds
) -> PrecisionChoice:
    """The precision for `train.precision: auto`.

    bf16 where the device multiplies it faster than float32, else fp16 on NVIDIA and AMD GPUs, else fp32.

    Args:
        device_type: `cpu`, `cuda` (NVIDIA and AMD), `mps`, ...
        measure: gives the milliseconds of a product.
    """
    plain, bf16 = measure(device_type, "fp32"), measure(device_type, "bf16")
    assert plain is not None, "every device multiplies float32"
    if bf16 is not None and bf16 < plain:
        return PrecisionChoice("bf16", f"this {device_type} multiplies bf16 {plain / bf16:.1f} times as fast as fp32")
    slow = "has no bf16" if bf16 is None else f"takes {bf16 / plain:.1f} times as long in bf16 as in fp32"
    if device_type == "cuda":
        return PrecisionChoice("fp16", f"this GPU {slow}")
    return PrecisionChoice("fp32", f"this {device_type} {slow}")


def emulation_warning(
    precision: Precision, device_type: str, measure: Callable[[str, Precision], float | None] = product_milliseconds
) -> str | None:
    """One line for a run whose precision this device only emulates; None where it is fast enough."""
    plain, found = measure(device_type, "fp32"), measure(device_type, precision)
    if plain is None or found is None or found < SLOW * plain:
        return None
    return (
        f"train.precision={precision} is emulated on this {device_type}: a matrix product takes {found / plain:.0f} "
        f"times as long as in fp32; set train.precision=fp32, or auto for a new run"
    )
