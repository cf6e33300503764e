"""Fine-tuning with few labels, and the weights between the zero-shot and the fine-tuned model (WiSE-FT).

Wortsman et al. 2022: the image tower and a linear head, initialised with the zero-shot classifier, are trained
together on cross entropy; then both are interpolated, w = (1 - alpha) * zero-shot + alpha * fine-tuned."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmssl.errors import UserError
from mmssl.evaluate.classifiers import logistic_regression
from mmssl.evaluate.classifiers.fine_tuning import (
    HeadedTower,
    TunableEncoder,
    attach_head,
    mix_weights,
    render_labelled,
    tune,
)
from mmssl.evaluate.datasets import read_images
from mmssl.evaluate.encode import encode_images
from mmssl.evaluate.metrics import baselines
from mmssl.evaluate.metrics.baselines import Baselines
from mmssl.evaluate.task import Metrics, TaskContext, list_baselines, list_intervals, write_outcomes
from mmssl.evaluate.tasks._classification import TrainedTask
from mmssl.files import write_csv
from mmssl.stats import Interval, means

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)


class FineTune(TrainedTask):
    """Train the image tower and a head on up to 16 samples per class."""

    name = "fine_tune"
    label = "fine-tuning with few labels"
    description = "The image tower trained on up to 16 samples per class, and weights between it and zero-shot."
    main_metrics = ("acc1@1",)
    paired = True

    def run(self, context: TaskContext) -> Metrics:
        """Write the accuracy of each alpha to alphas.csv."""
        found = evaluate(context)
        write_outcomes(context, context.images.samples, found.right)
        if context.folder is not None:
            _write_table(context.folder / "alphas.csv", found)
        return found.metrics | list_intervals(found.intervals) | list_baselines(found.baselines)


@dataclass(frozen=True)
class InterpolatedAccuracies:
    """Accuracies of N test samples along the line from the zero-shot to the fine-tuned weights."""

    metrics: dict[str, float]
    """`acc1@ALPHA` for each alpha: 0 is zero-shot, 1 is fine-tuned; `shots`, `lr`, `train_samples`, `classes` and
    `samples`."""
    intervals: dict[str, Interval]
    """95 % bootstrap intervals, over test samples."""
    baselines: Baselines
    """`majority` and `chance` of each accuracy."""
    right: dict[str, NDArray[np.bool_]]
    """`acc1@ALPHA` -> 1 where a test sample is right, [N]."""


def evaluate(context: TaskContext) -> InterpolatedAccuracies:
    """Fine-tune on the most shots (of 1, 2, 4, 8, 16) that every class has, and evaluate each alpha.

    Raises:
        UserError: the encoder cannot be trained, the training split is missing, or labels do not fit.
    """
    encoder = context.encoder
    if context.text_encoder is not None:
        raise UserError("task 'fine_tune' trains the image tower with all dimensions; leave out --dims, or this task")
    if not isinstance(encoder, TunableEncoder):
        raise UserError("task 'fine_tune' trains the model's image tower, but this encoder has none")
    train, train_labels, labels, names = context.labelled_training()
    shots = logistic_regression.available_shots(train_labels)[-1]
    rows, held_out = logistic_regression.draw_shots(train_labels, shots, seed=0)
    model = attach_head(encoder, context.class_weights(names))
    start = model.weights()
    lr = tune(
        model,
        render_labelled(encoder, train.samples, train_labels, rows),
        render_labelled(encoder, train.samples, train_labels, held_out),
        world=context.world,
        progress=context.progress,
    )
    end = model.weights()
    right = {}
    for alpha in ALPHAS:
        model.load_state_dict(mix_weights(start, end, alpha))
        right[f"acc1@{alpha:g}"] = _right(context, _TunedEncoder(encoder, model), labels)
    metrics, intervals = means(right, labels.numpy())
    known = baselines.of_classes(labels, list(metrics))
    counts = {"shots": shots, "lr": lr, "train_samples": len(rows), "classes": len(names), "samples": len(labels)}
    return InterpolatedAccuracies(metrics | counts, intervals, known, right)


def _write_table(path: Path, found: InterpolatedAccuracies) -> None:
    """alpha, accuracy and its interval: 0 is zero-shot, 1 is fine-tuned."""
    names = {alpha: f"acc1@{alpha:g}" for alpha in ALPHAS}
    rows = ((alpha, found.metrics[name], *found.intervals[name]) for alpha, name in names.items())
    write_csv(path, ("alpha", "acc1", "low", "high"), rows)


class _TunedEncoder:
    """The encoder with other weights in its image tower."""

    def __init__(self, encoder: TunableEncoder, model: HeadedTower) -> None:
        self._encoder = encoder
        self._model = model

    def render(self, image: bytes) -> Tensor:
        return self._encoder.render(image)

    def encode_rendered(self, images: Tensor) -> Tensor:
        features: Tensor = self._model.tower(images.to(self._model.head.device))
        return features

    def logits(self, features: Tensor) -> Tensor:
        with torch.no_grad():
            return self._model.logits(features.to(self._model.head.device)).cpu()

    def encode_image(self, images: Sequence[bytes]) -> Tensor:
        return self.encode_rendered(torch.stack([self.render(image) for image in images]))

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        return self._encoder.encode_text(texts)


def _right(context: TaskContext, tuned: _TunedEncoder, labels: Tensor) -> NDArray[np.bool_]:
    """True where a test sample is right, [N]."""
    encoded = encode_images(
        tuned,
        read_images(context.images.samples),
        batch_size=context.batch_size,
        world=context.world,
        progress=context.progress,
    )
    hits: NDArray[np.bool_] = (tuned.logits(encoded.features).argmax(1) == labels).numpy()
    return hits
