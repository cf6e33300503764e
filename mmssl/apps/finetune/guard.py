"""A guard: other labelled images whose zero-shot accuracy a fine-tuned model may not lose."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from mmssl.apps.finetune.datasets import LabelOptions, open_labelled_images
from mmssl.errors import UserError
from mmssl.evaluate import labels, suite
from mmssl.evaluate.classifiers import fine_tuning
from mmssl.inference import Model
from mmssl.rng import generator

ALPHAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Shares of the fine-tuned weights that are tried."""
LOSS = 0.02
"""Zero-shot accuracy that may be lost on the guard."""
IMAGES = 500
"""Images that are drawn of a larger guard: they are encoded once for each alpha."""


@dataclass(frozen=True)
class GuardSet:
    """Images of another task as a model sees them, and the vectors of its classes."""

    name: str
    images: fine_tuning.Labelled
    weights: Tensor
    """Unit vectors of the classes by the model's text tower, which is not trained, [C, D]."""
    loss: float = LOSS
    """Largest accepted fall of the accuracy."""

    def accuracy(self, tower: nn.Module) -> float:
        """Zero-shot accuracy with an image tower, which maps rendered images to unit vectors."""
        pixels, truth = self.images
        device = next(tower.parameters()).device
        right = 0
        with torch.no_grad():
            for start in range(0, len(truth), fine_tuning.BATCH):
                rows = slice(start, start + fine_tuning.BATCH)
                features = tower(pixels[rows].to(device)).float().cpu()
                right += int(((features @ self.weights.T).argmax(dim=1) == truth[rows]).sum())
        return right / len(truth)


def open_guard(
    model: Model,
    data: str,
    *,
    label_options: LabelOptions | None = None,
    loss: float = LOSS,
    seed: int = 0,
    options: suite.SuiteOptions | None = None,
) -> GuardSet:
    """Read the images of a guard, in any form that `gather` takes.

    Args:
        loss: largest accepted fall of the zero-shot accuracy.
        seed: of the draw of images.

    Raises:
        UserError: the data cannot be used, or its classes have no names.
    """
    settings = options or suite.SuiteOptions()
    dataset = open_labelled_images(data, label_options or LabelOptions(), settings)
    labelled = partial(labels.sample_label, dataset)
    encoder = suite.DatasetEncoder(model, settings)
    found = suite.usable_images(encoder.encode(dataset, dataset.name, [labelled]), labelled)
    suite.report_bad(dataset.name, found, settings)
    names, truth = labels.class_indices(dataset, found.samples)
    weights = encoder.context(dataset.name, dataset, found, None).class_weights(names)
    order = torch.from_numpy(generator(seed, "guard").permutation(len(truth)))[:IMAGES].sort().values
    return GuardSet(dataset.name, fine_tuning.render_labelled(model, found.samples, truth, order), weights, loss)


@dataclass(frozen=True)
class WeightMix:
    """The chosen share of the fine-tuned weights, and the guard's accuracies."""

    alpha: float
    guard_before: float | None = None
    guard_after: float | None = None

    def chosen(self) -> dict[str, float]:
        """As entries of the settings that were chosen."""
        found = {"alpha": self.alpha, "guard_before": self.guard_before, "guard_after": self.guard_after}
        return {name: value for name, value in found.items() if value is not None}


def choose_mixture(
    tuned: fine_tuning.HeadedTower,
    pretrained: fine_tuning.Weights,
    held_out: fine_tuning.Labelled,
    guard: GuardSet | None,
    alphas: Sequence[float] = ALPHAS,
) -> WeightMix:
    """Leave the best weights between pretrained and fine-tuned ones in the tower (WiSE-FT, Wortsman et al. 2022).

    Of the mixtures that keep the guard's accuracy, the one with the best accuracy on held-out images wins; of equal
    ones, that nearest to the pretrained weights, which lose nothing. Without held-out images it is the last.

    Args:
        tuned: with the fine-tuned weights.
        alphas: rising shares of these. With 0 among them, one mixture always keeps the guard.
    """
    end = tuned.weights()
    best: tuple[float, WeightMix] | None = None
    before: float | None = None
    if guard is not None:
        tuned.load_state_dict(pretrained)
        before = guard.accuracy(tuned.tower)
    for alpha in alphas:
        tuned.load_state_dict(fine_tuning.mix_weights(pretrained, end, alpha))
        after = None if guard is None else guard.accuracy(tuned.tower)
        if guard is not None and after is not None and before is not None and after < before - guard.loss - 1e-9:
            continue
        quality = fine_tuning.accuracy(tuned, held_out) if len(held_out[1]) else alpha
        if best is None or quality > best[0]:
            best = quality, WeightMix(alpha, before, after)
    if best is None:
        raise UserError(f"no alpha of {', '.join(map(str, alphas))} keeps the accuracy on {guard and guard.name}")
    tuned.load_state_dict(fine_tuning.mix_weights(pretrained, end, best[1].alpha))
    return best[1]
