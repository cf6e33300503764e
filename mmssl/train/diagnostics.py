"""Diagnostics of the objectives: their gradients on the shared towers, their images, and alarms.

Gradients are measured every few steps on a few samples. Alarms report signs of trouble in a run's metrics, each once.
"""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmssl.distributed import World
from mmssl.evaluate.metrics import embedding
from mmssl.objectives import IMAGE, Objective, TrainingTask, base, mixing

PROBE_ROWS = 64
"""Samples per measurement; a batch-coupled loss compares only these."""


def objective_gradients(
    task: TrainingTask, inputs: base.Inputs, active: Iterable[str], accelerator: Any
) -> dict[str, float]:
    """`NAME.gradient_norm` of each unweighted loss with respect to the towers, its `NAME.gradient_cosine` with the
    contrastive (or siglip) gradient over the weights both touch, `NAME.time_share` of its forward and backward
    pass, and `image_effective_rank` of the image features (1: all are equal; at most the number of samples),
    where images are read.

    Dropout is off and batch norms keep their statistics, so that measuring changes nothing.
    """
    names = list(active)
    rows = {name: tensor[:PROBE_ROWS] for name, tensor in inputs.items()}
    weights = [p for p in task.encoder.parameters() if p.requires_grad]
    training = task.training
    task.eval()
    found: dict[str, list[Tensor | None]] = {}
    seconds: dict[str, float] = {}
    for name in names:
        start = time.monotonic()
        with accelerator.autocast():
            predictions = task.predict(rows, [name])
            objective = task.objective(name)
            output = objective.loss(predictions[name], rows, World())
        loss = output.total / objective.num_terms(rows).clamp(min=1)
        touched = loss.requires_grad
        found[name] = list(torch.autograd.grad(loss, weights, allow_unused=True)) if touched else [None] * len(weights)
        _wait(loss.device)
        seconds[name] = time.monotonic() - start
    rank = {"image_effective_rank": _effective_rank(task, rows, accelerator)} if IMAGE.input in rows else {}
    task.train(training)
    measured = {f"{name}.gradient_norm": float(_dot(found[name], found[name]) ** 0.5) for name in names}
    measured |= {f"{name}.time_share": seconds[name] / sum(seconds.values()) for name in names}
    reference = mixing.find_reference(found)
    for name in names:
        if reference is not None and name != reference:
            measured[f"{name}.gradient_cosine"] = _cosine(found[name], found[reference])
    return measured | rank


@torch.no_grad()
def _effective_rank(task: TrainingTask, rows: base.Inputs, accelerator: Any) -> float:
    with accelerator.autocast():
        features = task.encoder.encode_image(rows[IMAGE.input])
    return embedding.effective_rank(features.float().cpu())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _dot(first: Sequence[Tensor | None], second: Sequence[Tensor | None]) -> float:
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    return float(sum((a.float() * b.float()).sum() for a, b in pairs))


def _cosine(first: Sequence[Tensor | None], second: Sequence[Tensor | None]) -> float:
    """Cosine of two gradients; 0 if they share no weight."""
    both = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    a, b = [x for x, _ in both], [y for _, y in both]
    length = (_dot(a, a) * _dot(b, b)) ** 0.5
    return _dot(a, b) / length if length > 0 else 0.0


SHEET_ROWS = 8
"""Samples shown."""


@torch.no_grad()
def objective_images(task: TrainingTask, inputs: base.Inputs, active: list[str], accelerator: Any) -> dict[str, Tensor]:
    """Objective -> uint8 [rows, columns, 3, H, W], for the objectives that draw images."""
    rows = {name: tensor[:SHEET_ROWS] for name, tensor in inputs.items()}
    training = task.training
    task.eval()
    with accelerator.autocast():
        predictions = task.predict(rows, active)
    shown = {name: task.objective(name).visualize(predictions[name], rows, task.encoder) for name in active}
    task.train(training)
    return {name: images for name, images in shown.items() if images is not None}


def write_image_grid(path: Path, images: Tensor) -> None:
    """Write uint8 [rows, columns, 3, H, W] as one PNG, one row per sample."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows, columns, _, height, width = images.shape
    sheet = images.permute(0, 3, 1, 4, 2).reshape(rows * height, columns * width, 3)
    Image.fromarray(sheet.cpu().numpy()).save(path)


EARLY = 0.1
"""Fraction of the training before which a loss near its start raises no alarm."""
EARLY_STEPS = 20
"""Steps before which a loss near its start raises no alarm."""
STUCK = 0.97
"""A contrastive loss above this fraction of the chance loss is no better than guessing."""
COLLAPSED = 2.0
"""An effective rank of the image features below this is a collapse: nearly equal features for all images."""


class Alarms:
    """Alarms about the metrics of steps, each reported once."""

    def __init__(
        self, objectives: Mapping[str, type[Objective]], batch_size: int, max_logit_scale: float, reported: list[str]
    ) -> None:
        """`reported`: the kinds of alarms already logged; kept up to date here."""
        self.objectives = objectives
        self.batch_size = batch_size
        self.max_logit_scale = max_logit_scale
        self.reported = reported

    def look(self, record: Mapping[str, float | int | str], progress: float) -> list[str]:
        """New alarms of a step, at the fraction `progress` of the training."""
        new = {kind: text for kind, text in self._signs(record, progress).items() if kind not in self.reported}
        self.reported.extend(new)
        return list(new.values())

    def _signs(self, record: Mapping[str, float | int | str], progress: float) -> dict[str, str]:
        def value(name: str) -> float:
            return float(record.get(name, math.nan))

        signs = {}
        step = record["step"]
        active = [name for name in sorted(self.objectives) if f"{name}.loss" in record]
        reference = next((name for name in active if self.objectives[name].is_reference), "")
        chance = (self.objectives[reference].chance_loss(self.batch_size) if reference else None) or 0.0
        # Where captions repeat, that of the batch is known.
        chance = float(record.get(f"{reference}.chance_loss", chance))
        late = progress > EARLY and value("step") > EARLY_STEPS
        if late and value(f"{reference}.loss") > STUCK * chance > 0:
            signs["stuck"] = (
                f"step {step}: the {reference} loss {value(f'{reference}.loss'):.2f} is no better than guessing, "
                f"{chance:.2f}; check that captions match their images (mmssl shards show), or try a lower optim.lr "
                f"or a longer optim.warmup"
            )
        if progress < 0.5 and value(f"{reference}.logit_scale") > 0.999 * self.max_logit_scale:
            signs["clamp"] = (
                f"step {step}: the temperature reached its clamp (model.max_logit_scale={self.max_logit_scale:g}) in "
                f"the first half of the training; a lower optim.lr or more data may help"
            )
        if value("image_effective_rank") < COLLAPSED:
            signs["collapsed"] = (
                f"step {step}: the image features collapsed (effective rank {value('image_effective_rank'):.1f}): "
                f"nearly equal features for all images; lower optim.lr, or the weights of the other objectives"
            )
        for name in active:
            metrics = {key.removeprefix(f"{name}."): value(key) for key in record if key.startswith(f"{name}.")}
            signs |= {kind: f"step {step}: {text}" for kind, text in self.objectives[name].alarms(metrics).items()}
        return signs
