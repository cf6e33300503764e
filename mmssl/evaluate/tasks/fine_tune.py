"""Fine-tuning with few labels, and the weights between the zero-shot and the fine-tuned model (WiSE-FT).

Wortsman et al. 2022: the image's tower and a linear head that begins as the zero-shot classifier are trained together
on cross entropy; then both are interpolated, w = (1 - alpha) * zero-shot + alpha * fine-tuned."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmssl.errors import UserError
from mmssl.evaluate.classifiers import logistic_regression as probe
from mmssl.evaluate.classifiers.fine_tuning import HeadedTower, TunableEncoder, Weights, mixed, rendered, tune
from mmssl.evaluate.datasets import read_again, training_split
from mmssl.evaluate.encode import encode_images
from mmssl.evaluate.labels import class_indices
from mmssl.evaluate.task import TaskContext
from mmssl.files import write_csv
from mmssl.stats import Interval, means

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class FineTuned:
    """Accuracies of N test samples along the line from the zero-shot to the fine-tuned weights."""

    metrics: dict[str, float]
    """`acc1@ALPHA` for each alpha: 0 is zero-shot, 1 is fine-tuned; `shots`, `lr`, `train_samples`, `classes` and
    `samples`."""
    intervals: dict[str, Interval]
    """95 % bootstrap intervals, over test samples."""
    right: dict[str, NDArray[np.bool_]]
    """Whether each test sample is right at each alpha, [N]."""


def evaluate(job: TaskContext) -> FineTuned:
    """Fine-tune on the most shots (of 1, 2, 4, 8, 16) that every class has, and judge each alpha.

    Raises:
        UserError: the encoder cannot be trained, there is no training split, or labels do not fit.
    """
    encoder = job.encoder
    if not isinstance(encoder, TunableEncoder):
        raise UserError("task 'fine_tune' trains the model's image tower, which this encoder does not give")
    train = job.training()
    names, both = class_indices(job.dataset, [*train.samples, *job.embedded.samples])
    train_labels, labels = both[: len(train.samples)], both[len(train.samples) :]
    shots = probe.shots_of(train_labels)[-1]
    rows, held_out = probe.draw_shots(train_labels, shots, seed=0)
    samples = [train.samples[i] for i in torch.cat([rows, held_out]).tolist()]
    images = rendered(encoder, training_split(job.dataset), samples)
    model = HeadedTower(encoder.image_module(), job.class_weights(names), encoder.logit_scale)
    model.to(encoder.device).eval()
    start = model.weights()
    lr = tune(
        model,
        (images[: len(rows)], train_labels[rows]),
        (images[len(rows) :], train_labels[held_out]),
        world=job.world,
        progress=job.progress,
    )
    end = model.weights()
    right = {f"acc1@{alpha:g}": _right(job, encoder, model, mixed(start, end, alpha), labels) for alpha in ALPHAS}
    figures, intervals = means(right)
    counts = {"shots": shots, "lr": lr, "train_samples": len(rows), "classes": len(names), "samples": len(labels)}
    return FineTuned(figures | counts, intervals, right)


def write_table(path: Path, found: FineTuned) -> None:
    """alpha, accuracy and its interval: 0 is zero-shot, 1 is fine-tuned."""
    names = {alpha: f"acc1@{alpha:g}" for alpha in ALPHAS}
    rows = ((alpha, found.metrics[name], *found.intervals[name]) for alpha, name in names.items())
    write_csv(path, ("alpha", "acc1", "low", "high"), rows)


class _Tuned:
    """The encoder with other weights in its image tower."""

    def __init__(self, encoder: TunableEncoder, model: HeadedTower) -> None:
        self._encoder = encoder
        self._model = model

    def render(self, image: bytes) -> Tensor:
        return self._encoder.render(image)

    def encode_rendered(self, images: Tensor) -> Tensor:
        features: Tensor = self._model.tower(images.to(self._model.head.device))
        return features

    def encode_image(self, images: Sequence[bytes]) -> Tensor:
        return self.encode_rendered(torch.stack([self.render(image) for image in images]))

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        return self._encoder.encode_text(texts)


def _right(
    job: TaskContext, encoder: TunableEncoder, model: HeadedTower, weights: Weights, labels: Tensor
) -> NDArray[np.bool_]:
    """Whether each test sample is right with these weights, [N]."""
    model.load_state_dict(weights)
    embedded = encode_images(
        _Tuned(encoder, model),
        read_again(job.dataset),
        batch_size=job.batch_size,
        world=job.world,
        progress=job.progress,
    )
    with torch.no_grad():
        scores = model.logits(embedded.features.to(model.head.device)).cpu()
    hits: NDArray[np.bool_] = (scores.argmax(1) == labels).numpy()
    return hits
