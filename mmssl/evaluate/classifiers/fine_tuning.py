"""Training an image tower together with a linear head, and the weights between two models (WiSE-FT)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmssl.distributed import World
from mmssl.errors import UserError
from mmssl.evaluate.datasets import read_images
from mmssl.evaluate.encode import ALONE, Progress, RenderingEncoder
from mmssl.evaluate.metrics.ranking import share
from mmssl.rng import generator
from mmssl.types import Sample

RATES = (1e-5, 1e-4, 1e-3)
"""Learning rates to choose from."""
EPOCHS = 10
STEPS = 100
"""Least number of updates: few samples are seen more often."""
BATCH = 64
MEASUREMENTS = 10
"""Times that a training with patience measures the accuracy on held-out images."""
WEIGHT_DECAY = 0.1

Weights = dict[str, Tensor]
Labelled = tuple[Tensor, Tensor]
"""Rendered images, uint8 [N, 3, S, S], and their classes, int64 [N]."""


@dataclass(frozen=True)
class TuneOptions:
    """The training of a tower and its head."""

    rates: Sequence[float] = RATES
    """Learning rates; the best one on held-out samples is used."""
    epochs: int = EPOCHS
    """Passes over the samples."""
    seed: int = 0
    """Seed of the order of the samples."""
    patience: int | None = None
    """Keep the weights that were best on held-out images, measured ten times and before the training, and end it after
    so many measurements without improvement. None: train to the end, and keep the last weights."""
    log_prior: Tensor | None = None
    """Logarithms of the class frequencies, [C], added to the logits in training alone: the trained classifier then
    treats classes of unequal sizes alike (Menon et al. 2021). None: add nothing."""


@runtime_checkable
class TunableEncoder(RenderingEncoder, Protocol):
    """An encoder whose image side can be trained."""

    @property
    def logit_scale(self) -> float:
        """Factor from similarities to logits."""
        ...

    @property
    def device(self) -> torch.device:
        """The device it computes on."""
        ...

    def image_module(self) -> nn.Module:
        """A trainable copy of the module that maps rendered images, uint8 [N, 3, S, S], to unit vectors [N, D]."""
        ...


class HeadedTower(nn.Module):
    """Images to logits: a tower and a head of one vector and one bias per class."""

    def __init__(self, tower: nn.Module, head: Tensor, scale: float, bias: Tensor | None = None) -> None:
        """Args:
        head: [C, D]; `scale` times its products with unit vectors are logits. bias: [C]. None: zeros.
        """
        super().__init__()
        self.tower = tower
        self.scale = scale
        self.head = nn.Parameter(head.clone())
        self.bias = nn.Parameter(torch.zeros(len(head)) if bias is None else bias.clone())

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [N, 3, S, S] -> logits [N, C]."""
        return self.logits(self.tower(images))

    def logits(self, features: Tensor) -> Tensor:
        """Logits [N, C] of unit vectors [N, D]."""
        return self.scale * features @ self.head.T + self.bias

    def weights(self) -> Weights:
        """A copy of all weights."""
        return {name: value.detach().clone() for name, value in self.state_dict().items()}


class BestWeights:
    """The weights with the highest accuracy on held-out images; of equal ones, those with the likeliest labels."""

    def __init__(self, model: HeadedTower, held_out: Labelled, by_class: bool = False) -> None:
        """
        Args:
            by_class: each class counts alike.
        """
        self._model, self._held_out, self._by_class = model, held_out, by_class
        self.quality, self.weights, self.waited = quality(model, held_out, by_class), model.weights(), 0

    def measure(self) -> int:
        """Measure the present weights; the number of measurements since the best."""
        found = quality(self._model, self._held_out, self._by_class)
        self.waited += 1
        if found > self.quality:
            self.quality, self.weights, self.waited = found, self._model.weights(), 0
        return self.waited


def train(
    model: HeadedTower,
    shown: Labelled,
    lr: float,
    options: TuneOptions,
    progress: Progress | None = None,
    held_out: Labelled | None = None,
) -> None:
    """Minimise the cross entropy by AdamW with a cosine schedule, in place; `options.rates` is not used.

    The model stays in evaluation mode: no dropout, and batch norms keep their statistics.

    Args:
        held_out: images for `options.patience`.
    """
    images, labels = shown
    device = model.head.device
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=WEIGHT_DECAY)
    batches = math.ceil(len(labels) / BATCH)
    epochs = max(options.epochs, math.ceil(STEPS / batches))
    steps, step = epochs * batches, 0
    watched = held_out is not None and len(held_out[1]) > 0 and options.patience is not None
    best = BestWeights(model, held_out, options.log_prior is not None) if watched and held_out is not None else None
    prior = 0.0 if options.log_prior is None else options.log_prior.float().to(device)
    for epoch in range(epochs):
        order = torch.from_numpy(generator(options.seed, "fine-tune", epoch).permutation(len(labels)))
        for rows in torch.split(order, BATCH):
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
            loss = F.cross_entropy(model(images[rows].to(device)) + prior, labels[rows].to(device))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            step += 1
            if progress is not None:
                progress(f"learning rate {lr:g}, updates of {steps:,}:", step)
        measured = (epoch + 1) * MEASUREMENTS // epochs > epoch * MEASUREMENTS // epochs
        if best is not None and measured and best.measure() >= (options.patience or 1):
            break
    if best is not None:
        model.load_state_dict(best.weights)


def tune(
    model: HeadedTower,
    shown: Labelled,
    held_out: Labelled,
    options: TuneOptions | None = None,
    *,
    world: World = ALONE,
    progress: Progress | None = None,
) -> float:
    """Train the model in place with the learning rate that is best on held-out images; returns that rate.

    Of equally good rates the lowest wins; without held-out images, the first. Rank 0 trains; all ranks end
    with its weights.

    Raises:
        UserError: the training ended with weights that are not finite.
    """
    options = options or TuneOptions()
    rates = options.rates
    start = model.weights()
    found: list[tuple[float, float, Weights]] = []
    alone = world.rank == 0
    for lr in (rates if len(held_out[1]) > 0 else rates[:1]) if alone else ():
        model.load_state_dict(start)
        train(model, shown, lr, options, progress, held_out)
        found.append((quality(model, held_out, options.log_prior is not None)[0], lr, model.weights()))
    best = max(found, key=lambda trial: trial[0], default=(0.0, 0.0, start))
    model.load_state_dict({n: world.sum(w if alone else torch.zeros_like(w)) for n, w in best[2].items()})
    lr = float(world.broadcast(best[1]))
    if not all(bool(torch.isfinite(weight).all()) for weight in model.weights().values()):
        raise UserError(f"fine-tuning at a learning rate of {lr:g} ended with weights that are not finite; lower it")
    return lr


def mix_weights(start: Mapping[str, Tensor], end: Mapping[str, Tensor], alpha: float) -> Weights:
    """(1 - alpha) * start + alpha * end of all floating-point weights; others as at the start."""
    return {
        name: (1 - alpha) * value + alpha * end[name] if value.is_floating_point() else value
        for name, value in start.items()
    }


def attach_head(encoder: TunableEncoder, head: Tensor, bias: Tensor | None = None) -> HeadedTower:
    """The encoder's image tower with a head, [C, D], on the encoder's device; the encoder stays as it is."""
    return HeadedTower(encoder.image_module(), head, encoder.logit_scale, bias).to(encoder.device).eval()


def render_labelled(encoder: RenderingEncoder, samples: Sequence[Sample], labels: Tensor, rows: Tensor) -> Labelled:
    """Some samples of a dataset as the model sees them, read from the shards.

    Args:
        labels: of all samples, int64 [N].
        rows: the chosen ones, in the order of the result, int64 [n].
    """
    chosen = [samples[index] for index in rows.tolist()]
    if not chosen:
        return torch.empty(0, 3, 0, 0, dtype=torch.uint8), labels[rows]
    found = {sample.id: encoder.render(sample.image) for sample in read_images(chosen)}
    return torch.stack([found[sample.id] for sample in chosen]), labels[rows]


def accuracy(model: HeadedTower, held_out: Labelled) -> float:
    """Fraction of images that are classified correctly; 0 without any."""
    return quality(model, held_out)[0]


def quality(model: HeadedTower, held_out: Labelled, by_class: bool = False) -> tuple[float, float]:
    """Fraction of images that are classified correctly, and the mean log-likelihood of their labels; 0 and -inf if the
    outputs are not finite, zeros without any image.

    Args:
        by_class: means over the classes of the means of each, so that rare classes count as much as frequent ones.
    """
    images, labels = held_out
    if len(labels) == 0:
        return 0.0, 0.0
    device = model.head.device
    with torch.no_grad():
        scores = torch.cat([model(part.to(device)).cpu() for part in torch.split(images, BATCH)])
    likelihood = -float(F.cross_entropy(scores, labels))
    if not math.isfinite(likelihood):
        return 0.0, -math.inf
    right = scores.argmax(1) == labels
    if not by_class:
        return share(right), likelihood
    counts = torch.bincount(labels).double()
    weights = 1 / (counts[labels] * (counts > 0).sum())
    losses = F.cross_entropy(scores, labels, reduction="none").double()
    return float((weights * right).sum()), -float((weights * losses).sum())
