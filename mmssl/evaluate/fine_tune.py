"""Fine-tuning with few labels, and the weights between the zero-shot and the fine-tuned model (WiSE-FT).

Wortsman et al. 2022: the picture's tower and a linear head that begins as the zero-shot classifier are trained together
on cross entropy; then both are interpolated, w = (1 - alpha) * zero-shot + alpha * fine-tuned."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmssl.data.sample import BadSample
from mmssl.evaluate import probe, zero_shot
from mmssl.evaluate.datasets import labels_of, read, training_split
from mmssl.evaluate.embed import RenderingEncoder, embed_pictures
from mmssl.evaluate.interval import Interval, bootstrap
from mmssl.evaluate.job import Job
from mmssl.evaluate.metrics import share
from mmssl.evaluate.tables import write_csv
from mmssl.rng import generator
from mmssl.types import Sample, UserError

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
RATES = (1e-5, 1e-4, 1e-3)
"""Learning rates, of which the one that does best on held-out samples is taken."""
EPOCHS = 10
STEPS = 100
"""Few samples are seen more often, until there are so many updates."""
BATCH = 64
WEIGHT_DECAY = 0.1

Weights = dict[str, Tensor]


@runtime_checkable
class TunableEncoder(RenderingEncoder, Protocol):
    """An encoder whose picture side can be trained."""

    @property
    def logit_scale(self) -> float:
        """Factor from similarities to logits."""
        ...

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        ...

    def image_module(self) -> nn.Module:
        """A copy of what turns rendered pictures, uint8 [N, 3, S, S], into unit vectors [N, D], all of it trainable."""
        ...


class Classifier(nn.Module):
    """Pictures to class scores: the tower and a head of one vector a class."""

    def __init__(self, tower: nn.Module, head: Tensor) -> None:
        super().__init__()
        self.tower = tower
        self.head = nn.Parameter(head.clone())

    def forward(self, pictures: Tensor) -> Tensor:
        """uint8 [N, 3, S, S] -> similarities [N, C]."""
        scores: Tensor = self.tower(pictures) @ self.head.T
        return scores


@dataclass(frozen=True)
class FineTuned:
    """Accuracies of N test samples along the line from the zero-shot to the fine-tuned weights."""

    metrics: dict[str, float]
    """`acc1@ALPHA` for each alpha: 0 is zero-shot, 1 is fine-tuned; `shots`, `lr`, `train_samples`, `classes` and
    `samples`."""
    intervals: dict[str, Interval]
    """95 % bootstrap intervals, over test samples."""


def evaluate(job: Job) -> FineTuned:
    """Fine-tune on the most shots (of 1, 2, 4, 8, 16) that every class has, and judge each alpha.

    Raises:
        UserError: the encoder cannot be trained, there is no training split, or labels do not fit.
    """
    encoder = job.encoder
    if not isinstance(encoder, TunableEncoder):
        raise UserError("task 'fine_tune' trains the model's picture tower, which this encoder does not give")
    train = job.training()
    names, both = labels_of(job.dataset, [*train.samples, *job.embedded.samples])
    train_labels, labels = both[: len(train.samples)], both[len(train.samples) :]
    scarcest = int(np.unique(train_labels.numpy(), return_counts=True)[1].min())
    shots = max(k for k in probe.SHOTS if k <= scarcest)
    rows, held_out = probe.draw_shots(train_labels, shots, seed=0)
    pictures = _rendered(job, encoder, [train.samples[i] for i in torch.cat([rows, held_out]).tolist()])
    templates = job.dataset.templates if job.dataset.templates is not None else zero_shot.DEFAULT_TEMPLATES
    head = zero_shot.class_weights(
        encoder, names, templates, batch_size=job.batch_size, processes=job.processes, progress=job.progress
    )
    model = Classifier(encoder.image_module(), head).to(encoder.device).eval()
    start = _copy(model)
    lr = _train(model, start, pictures, (train_labels[rows], train_labels[held_out]), encoder.logit_scale, job)
    end = _copy(model)
    right = {f"acc1@{alpha:g}": _right(job, encoder, model, mixed(start, end, alpha), labels) for alpha in ALPHAS}
    figures: dict[str, float] = {name: float(hits.mean()) for name, hits in right.items()}
    counts = {"shots": shots, "lr": lr, "train_samples": len(rows), "classes": len(names), "samples": len(labels)}
    intervals = bootstrap(lambda drawn: {name: float(hits[drawn].mean()) for name, hits in right.items()}, len(labels))
    return FineTuned(figures | counts, intervals)


def train(model: Classifier, pictures: Tensor, labels: Tensor, *, lr: float, scale: float, seed: int = 0) -> None:
    """Minimise the cross entropy of scale * scores by AdamW with a cosine schedule, in place.

    The model stays in evaluation mode: no dropout, and batch norms keep their statistics.

    Args:
        pictures: uint8 [N, 3, S, S]. labels: int64 [N].
    """
    device = model.head.device
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=WEIGHT_DECAY)
    batches = math.ceil(len(labels) / BATCH)
    epochs = max(EPOCHS, math.ceil(STEPS / batches))
    steps, step = epochs * batches, 0
    for epoch in range(epochs):
        order = torch.from_numpy(generator(seed, "fine-tune", epoch).permutation(len(labels)))
        for rows in torch.split(order, BATCH):
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
            loss = F.cross_entropy(scale * model(pictures[rows].to(device)), labels[rows].to(device))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            step += 1


def mixed(start: Mapping[str, Tensor], end: Mapping[str, Tensor], alpha: float) -> Weights:
    """(1 - alpha) * start + alpha * end of all floating-point weights; others as at the start."""
    return {
        name: (1 - alpha) * value + alpha * end[name] if value.is_floating_point() else value
        for name, value in start.items()
    }


def write_table(path: Path, found: FineTuned) -> None:
    """alpha, accuracy and its interval: 0 is zero-shot, 1 is fine-tuned."""
    names = {alpha: f"acc1@{alpha:g}" for alpha in ALPHAS}
    rows = ((alpha, found.metrics[name], *found.intervals[name]) for alpha, name in names.items())
    write_csv(path, ("alpha", "acc1", "low", "high"), rows)


def _train(
    model: Classifier,
    start: Weights,
    pictures: Tensor,
    labels: tuple[Tensor, Tensor],
    scale: float,
    job: Job,
) -> float:
    """Train the model with the best learning rate, which is returned. All ranks end with rank 0's weights.

    Args:
        pictures: those to train on, then those to choose the learning rate by, with their `labels`.
    """
    shown, held_out = pictures[: len(labels[0])], pictures[len(labels[0]) :]
    found: list[tuple[float, float, Weights]] = []
    for lr in (RATES if len(held_out) > 0 else RATES[:1]) if job.processes.rank == 0 else ():
        model.load_state_dict(start)
        train(model, shown, labels[0], lr=lr, scale=scale)
        found.append((_accuracy(model, held_out, labels[1]), lr, _copy(model)))
        if job.progress is not None:
            job.progress("learning rates tried", len(found))
    # Of equally good rates the lowest.
    best = max(found, key=lambda trial: trial[0], default=(0.0, 0.0, start))
    alone = job.processes.rank == 0
    model.load_state_dict({n: job.processes.sum(w if alone else torch.zeros_like(w)) for n, w in best[2].items()})
    return float(job.processes.broadcast(best[1]))


def _accuracy(model: Classifier, pictures: Tensor, labels: Tensor) -> float:
    if len(labels) == 0:
        return 0.0
    device = model.head.device
    with torch.no_grad():
        scores = torch.cat([model(part.to(device)).cpu() for part in torch.split(pictures, BATCH)])
    return share(scores.argmax(1) == labels)


class _Tuned:
    """The encoder with other weights in its picture tower."""

    def __init__(self, encoder: TunableEncoder, model: Classifier) -> None:
        self._encoder = encoder
        self._model = model

    def render(self, picture: bytes) -> Tensor:
        return self._encoder.render(picture)

    def encode_rendered(self, pictures: Tensor) -> Tensor:
        features: Tensor = self._model.tower(pictures.to(self._model.head.device))
        return features

    def encode_image(self, images: Sequence[bytes]) -> Tensor:
        return self.encode_rendered(torch.stack([self.render(image) for image in images]))

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        return self._encoder.encode_text(texts)


def _right(
    job: Job, encoder: TunableEncoder, model: Classifier, weights: Weights, labels: Tensor
) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Whether each test sample is right with these weights, [N]."""
    model.load_state_dict(weights)
    embedded = embed_pictures(
        _Tuned(encoder, model),
        read(job.dataset, _reported_before),
        batch_size=job.batch_size,
        processes=job.processes,
        progress=job.progress,
    )
    scores = embedded.features @ weights["head"].cpu().T
    return (scores.argmax(1) == labels).numpy()


def _rendered(job: Job, encoder: TunableEncoder, samples: Sequence[Sample]) -> Tensor:
    """What the encoder sees of some training samples, in their order, from one more pass over the shards."""
    place = {sample.id: index for index, sample in enumerate(samples)}
    found: dict[int, Tensor] = {}
    for sample in read(training_split(job.dataset), _reported_before):
        if sample.id in place:
            found[place[sample.id]] = encoder.render(sample.image)
    return torch.stack([found[index] for index in range(len(samples))])


def _copy(model: nn.Module) -> Weights:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _reported_before(bad: BadSample) -> None:
    """Bad samples were kept when the pictures were encoded."""
