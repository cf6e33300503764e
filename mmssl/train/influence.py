"""What each objective does to the shared towers, measured every so many steps on a few samples."""

import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmssl.distributed import Processes
from mmssl.evaluate.geometry import effective_rank
from mmssl.objectives import reference
from mmssl.objectives.base import CLEAN_IMAGE, Inputs
from mmssl.objectives.mixer import Mixer

ROWS = 64
"""Samples it is measured on; a coupled loss is taken among them alone."""


def influence(mixer: Mixer, inputs: Inputs, active: Iterable[str], accelerator: Any) -> dict[str, float]:
    """`NAME.gradient_norm` of each unweighted loss with respect to the towers, its `NAME.gradient_cosine` with the
    contrastive (or siglip) gradient over the weights both touch, `NAME.time_share` of a forward and backward pass of
    its own, and `image_effective_rank` of the picture features (1: all are the same; at most the number of samples).

    Dropout is off and batch norms keep their statistics, so that measuring changes nothing.
    """
    names = list(active)
    rows = {name: tensor[:ROWS] for name, tensor in inputs.items()}
    weights = [p for p in mixer.encoder.parameters() if p.requires_grad]
    training = mixer.training
    mixer.eval()
    found: dict[str, list[Tensor | None]] = {}
    seconds: dict[str, float] = {}
    for name in names:
        start = time.monotonic()
        with accelerator.autocast():
            predictions = mixer.predict(rows, [name])
            objective = mixer.objective(name)
            output = objective.loss(predictions[name], rows, Processes())
        loss = output.total / objective.count(rows).clamp(min=1)
        touched = loss.requires_grad
        found[name] = list(torch.autograd.grad(loss, weights, allow_unused=True)) if touched else [None] * len(weights)
        _wait(loss.device)
        seconds[name] = time.monotonic() - start
    rank = _effective_rank(mixer, rows, accelerator)
    mixer.train(training)
    figures = {f"{name}.gradient_norm": float(_dot(found[name], found[name]) ** 0.5) for name in names}
    figures |= {f"{name}.time_share": seconds[name] / sum(seconds.values()) for name in names}
    base = reference(found)
    for name in names:
        if base is not None and name != base:
            figures[f"{name}.gradient_cosine"] = _cosine(found[name], found[base])
    return figures | {"image_effective_rank": rank}


@torch.no_grad()
def _effective_rank(mixer: Mixer, rows: Inputs, accelerator: Any) -> float:
    with accelerator.autocast():
        features = mixer.encoder.encode_image(rows[CLEAN_IMAGE.input])
    return effective_rank(features.float().cpu())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _dot(first: Sequence[Tensor | None], second: Sequence[Tensor | None]) -> float:
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    return float(sum((a.float() * b.float()).sum() for a, b in pairs))


def _cosine(first: Sequence[Tensor | None], second: Sequence[Tensor | None]) -> float:
    """0 where they touch no weight together."""
    both = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    a, b = [x for x, _ in both], [y for _, y in both]
    length = (_dot(a, a) * _dot(b, b)) ** 0.5
    return _dot(a, b) / length if length > 0 else 0.0
