"""Methods to make a classifier of a pretrained model: linear, full, and linear then full (LP-FT, Kumar et al. 2022)."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmssl.apps.finetune.classifier import Classifier
from mmssl.apps.finetune.datasets import HELD_OUT, FineTuneData, LabelledImages
from mmssl.apps.finetune.guard import ALPHAS, GuardSet, choose_mixture
from mmssl.errors import UserError
from mmssl.evaluate import compare, datasets, encode
from mmssl.evaluate.classifiers import fine_tuning, logistic_regression
from mmssl.evaluate.metrics import baselines, classification
from mmssl.inference import Model
from mmssl.models import ImageEncoder
from mmssl.stats import Interval, means

Method = Literal["linear", "full", "lp-ft"]
METHODS: tuple[Method, ...] = get_args(Method)
PATIENCE = 3
"""Measurements without improvement on held-out samples, of ten, after which full training ends."""
Hits = NDArray[np.float64]
"""1 where a test sample is classified correctly, else 0, [N]."""


@dataclass(frozen=True)
class FineTuneSettings:
    """Options of fine-tuning."""

    method: Method = "linear"
    shots: int | None = None
    """Samples per class to train on, with up to 4 others of each class to choose settings. None: all, of
    which a fifth choose settings."""
    seed: int = 0
    """Of the draw of samples and of their order."""
    alpha: float | None = 1.0
    """Weights (1 - alpha) * zero-shot + alpha * fine-tuned (WiSE-FT, Wortsman et al. 2022). None: chosen."""
    balance: bool = False
    """Treat classes of unequal sizes alike, by logits adjusted by the class frequencies (Menon et al. 2021)."""
    rates: Sequence[float] = fine_tuning.RATES
    """Learning rates to choose among in full training."""
    epochs: int = fine_tuning.EPOCHS
    """Passes over the samples in full training; few samples are seen more often."""


@dataclass(frozen=True)
class Tuned:
    """A classifier and its outcomes on the test samples."""

    classifier: Classifier
    after: Hits
    before: Hits | None
    """Outcomes of zero-shot classification; None without class names."""
    chosen: dict[str, float]
    """Settings chosen on held-out samples: the regularisation `c`, the learning rate `lr`, the share `alpha` of the
    fine-tuned weights; and the accuracies on the guard, `guard_before` and `guard_after`."""
    train_samples: int
    labels: Tensor
    """Classes of the test samples, int64 [N]."""
    kept_start: bool = False
    """No weights of full training were better on held-out samples than those before it, so that these are kept."""

    def metrics(self) -> dict[str, Any]:
        """Accuracies, 95 % intervals, the difference, and the accuracies without the image, for JSON."""
        found: dict[str, Any] = {
            "acc1": float(self.after.mean()),
            "acc1_interval": list(accuracy_interval(self.after, self.labels)),
            "mean_per_class_recall": mean_over_classes(self.after, self.labels),
            **self.baselines(),
        }
        difference = self.difference()
        if self.before is not None and difference is not None:
            found |= {
                "zero_shot": float(self.before.mean()),
                "zero_shot_interval": list(accuracy_interval(self.before, self.labels)),
                "zero_shot_mean_per_class_recall": mean_over_classes(self.before, self.labels),
            }
            found |= {"gain_interval": list(difference.interval), "gain_p_value": difference.p_value}
        found |= self.chosen | {"train_samples": self.train_samples, "test_samples": len(self.after)}
        return found | ({"kept_start": True} if self.kept_start else {})

    def difference(self) -> compare.Difference | None:
        """The gain of fine-tuning on the test samples; None without class names."""
        if self.before is None:
            return None
        return replace(compare.compare(self.before, self.after, strata=self.labels.numpy()), baselines=self.baselines())

    def baselines(self) -> dict[str, float]:
        """Accuracies without the image: of the most frequent class (`majority`), and by `chance`."""
        return baselines.of_classes(self.labels, ["acc1"])["acc1"]


def fine_tune(
    model: Model,
    data: FineTuneData,
    settings: FineTuneSettings,
    progress: encode.Progress | None = None,
    guard: GuardSet | None = None,
) -> Tuned:
    """Train a classifier; the model stays as it is.

    The head begins as the zero-shot classifier, or at zero without class names. `linear` regularises the head towards
    its start; `full` trains the image tower and the head by AdamW, and keeps the weights that were best on held-out
    samples.

    Args:
        guard: the zero-shot accuracy on these images may not fall by more than it allows; `alpha` is chosen so.

    Raises:
        UserError: a class has no sample to train on, or weights are mixed without class names.
    """
    if (settings.alpha != 1 or guard is not None) and not data.named:
        raise UserError(
            "--alpha and --guard mix with the zero-shot classifier, which needs class names; give --classnames"
        )
    zero = data.zero_shot(model, progress)
    start = zero if zero is not None else logistic_regression.zeros(len(data.classnames), model.config.embed_dim)
    rows = split(data, settings.shots, settings.seed)
    chosen: dict[str, float] = {}
    head = start
    if settings.method != "full":
        head, chosen["c"] = fit_head(data.train, rows, start, settings.shots is None, settings.balance)
    tuned, kept_start = model, False
    if settings.method == "linear":
        head, mixture = _mix_heads(data.train, rows[1], (start, head), settings.alpha)
        chosen |= mixture
    else:
        tuned, head, more, kept_start = _train(model, data, rows, (start, head), settings, (progress, guard))
        chosen |= more
    record = {
        "method": settings.method,
        "shots": settings.shots,
        "seed": settings.seed,
        "alpha": chosen.get("alpha", settings.alpha),
        "balance": settings.balance,
        "templates": data.templates,
    }
    classifier = Classifier(tuned, list(classification.distinct(data.classnames)), head.weights, head.bias, record)
    features = data.test.features if tuned is model else encode_with(tuned, data.test, progress)
    result = Tuned(
        classifier=classifier,
        after=hits(classifier.logits(features), data.test.labels),
        before=None if zero is None else hits(zero.scores(data.test.features), data.test.labels),
        chosen=chosen,
        train_samples=len(rows[0]),
        labels=data.test.labels,
        kept_start=kept_start,
    )
    classifier.record["figures"] = result.metrics()
    return result


def split(data: FineTuneData, shots: int | None, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to train on and rows to choose settings on.

    Raises:
        UserError: a class has too few samples.
    """
    labels = data.train.labels
    counts = torch.bincount(labels, minlength=len(data.classnames))
    scarce = int(counts.argmin())
    if counts[scarce] < (shots or 1):
        name = f"class {data.classnames[scarce]!r}"
        if counts[scarce] == 0:
            raise UserError(f"{name} has no image to train on; add some, or take the class out of the test images")
        raise UserError(
            f"{name} has {counts[scarce]} images to train on, {shots} are needed; lower --shots, or leave the class out"
        )
    return (
        logistic_regression.hold_out(labels, HELD_OUT, seed)
        if shots is None
        else logistic_regression.draw_shots(labels, shots, seed)
    )


def fit_head(
    train: LabelledImages,
    rows: tuple[Tensor, Tensor],
    start: logistic_regression.Linear,
    refit: bool,
    balance: bool = False,
) -> tuple[logistic_regression.Linear, float]:
    """Logistic regression regularised towards its start, and its C."""
    return logistic_regression.probe(train.features, train.labels, rows, len(start.bias), refit, start, balance)


def by_class(outcomes: Hits, labels: Tensor) -> dict[int, tuple[int, float]]:
    """The number of test samples and the accuracy of each class that has any."""
    counts = np.bincount(labels.numpy())
    right = np.bincount(labels.numpy(), weights=outcomes)
    present = np.flatnonzero(counts).tolist()
    return {number: (int(counts[number]), float(right[number] / counts[number])) for number in present}


def mean_over_classes(outcomes: Hits, labels: Tensor) -> float:
    """The mean of the accuracies of the classes."""
    return float(np.mean([accuracy for _, accuracy in by_class(outcomes, labels).values()]))


def _mix_heads(
    train: LabelledImages,
    held_out: Tensor,
    heads: tuple[logistic_regression.Linear, logistic_regression.Linear],
    alpha: float | None,
) -> tuple[logistic_regression.Linear, dict[str, float]]:
    """The head between two, at a given alpha or at the best one on held-out samples, which is then named."""

    def mixed(share: float) -> logistic_regression.Linear:
        return heads[0].plus(heads[1].plus(heads[0], -1), share)

    if alpha is not None:
        return mixed(alpha), {}
    features, labels = train.features[held_out], train.labels[held_out]
    right = [float(hits(mixed(share).scores(features), labels).mean()) if len(labels) else share for share in ALPHAS]
    best = ALPHAS[int(np.argmax(right))]
    return mixed(best), {"alpha": best}


def hits(logits: Tensor, labels: Tensor) -> Hits:
    """1 where the highest logit of a row is that of its label, else 0."""
    found: Hits = (logits.argmax(1) == labels).numpy().astype(np.float64)
    return found


def accuracy_interval(outcomes: Hits, labels: Tensor) -> Interval:
    """The 95 % bootstrap interval of an accuracy, class by class where the classes have unequal sizes.

    Args:
        labels: of the samples, int64 [N].
    """
    return means({"acc1": outcomes}, labels.numpy())[1]["acc1"]


def encode_with(model: Model, images: LabelledImages, progress: encode.Progress | None = None) -> Tensor:
    """The features of another model, [N, D]."""
    return encode.encode_images(model, datasets.read_images(images.samples), progress=progress).features


def _train(
    model: Model,
    data: FineTuneData,
    rows: tuple[Tensor, Tensor],
    heads: tuple[logistic_regression.Linear, logistic_regression.Linear],
    settings: FineTuneSettings,
    watchers: tuple[encode.Progress | None, GuardSet | None],
) -> tuple[Model, logistic_regression.Linear, dict[str, float], bool]:
    """The model and the head after training both, the settings that were chosen, and true if the weights before the
    training are kept.

    Args:
        heads: the zero-shot head, and the initial one.
        watchers: the callback of the progress, and the guard.
    """
    progress, guard = watchers
    zero, start = (head.weights.float() / model.logit_scale for head in heads)
    tuned = fine_tuning.attach_head(model, start, heads[1].bias.float())
    pretrained = tuned.weights() | {"head": zero.to(model.device), "bias": heads[0].bias.float().to(model.device)}
    shown, held_out = (data.train.render(model, part) for part in rows)
    prior = logistic_regression.log_prior(shown[1], len(data.classnames)) if settings.balance else None
    options = fine_tuning.TuneOptions(settings.rates, settings.epochs, settings.seed, PATIENCE, prior)
    before = tuned.weights()
    chosen = {"lr": fine_tuning.tune(tuned, shown, held_out, options, progress=progress)}
    kept_start = all(torch.equal(before[name], weight) for name, weight in tuned.weights().items())
    if settings.alpha is None or guard is not None:
        # A given alpha is the largest that a guard may choose.
        alphas = [alpha for alpha in ALPHAS if settings.alpha is None or alpha < settings.alpha]
        alphas += [] if settings.alpha is None else [settings.alpha]
        chosen |= choose_mixture(tuned, pretrained, held_out, guard, alphas).chosen()
    else:
        tuned.load_state_dict(fine_tuning.mix_weights(pretrained, tuned.weights(), settings.alpha))
    weights = model.logit_scale * tuned.head.detach().double().cpu()
    head = logistic_regression.Linear(weights, tuned.bias.detach().double().cpu())
    tower = tuned.tower
    assert isinstance(tower, ImageEncoder)
    return _with_tower(model, tower), head, chosen, kept_start


def _with_tower(model: Model, tower: ImageEncoder) -> Model:
    """The model with a trained image tower."""
    encoder = copy.deepcopy(model.encoder)
    encoder.vision.load_state_dict(tower.vision.state_dict())
    encoder.image_projection.load_state_dict(tower.projection.state_dict())
    notes = [*model.notes, "its image tower was fine-tuned"]
    return Model(encoder, model.tokenizer, model.config, notes, model.precision)
