"""Ways to make a classifier of a pretrained model: linear, full, and linear then full (LP-FT, Kumar et al. 2022)."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmssl.apps.finetune.classifier import Classifier
from mmssl.apps.finetune.datasets import HELD_OUT, FineTuneData, Labelled
from mmssl.errors import UserError
from mmssl.evaluate.classifiers import logistic_regression as probe
from mmssl.evaluate.classifiers.fine_tuning import EPOCHS, RATES, HeadedTower, mixed, tune
from mmssl.evaluate.classifiers.logistic_regression import Linear
from mmssl.evaluate.compare import Difference, compare
from mmssl.evaluate.datasets import read_again
from mmssl.evaluate.encode import Progress, encode_images
from mmssl.evaluate.metrics.classification import distinct
from mmssl.inference import Model
from mmssl.models.dual_encoder import ImageEncoder
from mmssl.stats import Interval, bootstrap

Method = Literal["linear", "full", "lp-ft"]
METHODS: tuple[Method, ...] = get_args(Method)
Right = NDArray[np.float64]
"""1 where a test sample is right, else 0, [N]."""


@dataclass(frozen=True)
class FineTuneSettings:
    """How to fine-tune."""

    method: Method = "linear"
    shots: int | None = None
    """Samples of each class to train on, with up to 4 others of each to choose settings by. None: all there are, a
    fifth of them to choose by."""
    seed: int = 0
    """Of the draw of samples and of their order."""
    alpha: float = 1.0
    """Weights (1 - alpha) * zero-shot + alpha * fine-tuned (WiSE-FT, Wortsman et al. 2022)."""
    rates: Sequence[float] = RATES
    """Learning rates of full training to choose among."""
    epochs: int = EPOCHS
    """Passes over the samples in full training; few samples are seen more often."""


@dataclass(frozen=True)
class Tuned:
    """A classifier, and what became of each test sample."""

    classifier: Classifier
    after: Right
    before: Right | None
    """By the class names alone; None where the classes have none."""
    chosen: dict[str, float]
    """What was chosen on held-out samples: the regularisation `c`, the learning rate `lr`."""
    train_samples: int

    def figures(self) -> dict[str, Any]:
        """Accuracies, 95 % intervals, and the difference, as JSON holds them."""
        found: dict[str, Any] = {"acc1": float(self.after.mean()), "acc1_interval": list(accuracy_interval(self.after))}
        difference = self.difference()
        if self.before is not None and difference is not None:
            found |= {
                "zero_shot": float(self.before.mean()),
                "zero_shot_interval": list(accuracy_interval(self.before)),
            }
            found |= {"gain_interval": list(difference.interval), "gain_p_value": difference.p_value}
        return found | self.chosen | {"train_samples": self.train_samples, "test_samples": len(self.after)}

    def difference(self) -> Difference | None:
        """What fine-tuning gained on the test samples."""
        return None if self.before is None else compare(self.before, self.after)


def fine_tune(
    model: Model, problem: FineTuneData, settings: FineTuneSettings, progress: Progress | None = None
) -> Tuned:
    """Train a classifier; the model stays as it is.

    The head begins as the zero-shot classifier, or at zero where the classes have no names. `linear` draws the head's
    weights to where they begin; `full` trains the image tower and the head by AdamW.

    Raises:
        UserError: a class has no sample to train on, or `alpha` is given and the classes have no names.
    """
    if settings.alpha != 1 and not problem.named:
        raise UserError("--alpha mixes with the zero-shot classifier, which needs class names; give --classnames")
    zero = problem.zero_shot(model, progress)
    start = zero if zero is not None else probe.zeros(len(problem.classnames), model.config.embed_dim)
    rows = split(problem, settings.shots, settings.seed)
    chosen: dict[str, float] = {}
    head = start
    if settings.method != "full":
        head, chosen["c"] = fit_head(problem.train, rows, start, refit=settings.shots is None)
    tuned = model
    if settings.method == "linear":
        head = start.plus(head.plus(start, -1), settings.alpha)
    else:
        tuned, head, chosen["lr"] = _trained(model, problem, rows, (start, head), settings, progress)
    record = {
        "method": settings.method,
        "shots": settings.shots,
        "seed": settings.seed,
        "alpha": settings.alpha,
        "templates": problem.templates,
    }
    classifier = Classifier(tuned, list(distinct(problem.classnames)), head.weights, head.bias, record)
    features = problem.test.features if tuned is model else encode_again(tuned, problem.test, progress)
    result = Tuned(
        classifier=classifier,
        after=right(classifier.logits(features), problem.test.labels),
        before=None if zero is None else right(zero.scores(problem.test.features), problem.test.labels),
        chosen=chosen,
        train_samples=len(rows[0]),
    )
    classifier.record["figures"] = result.figures()
    return result


def split(problem: FineTuneData, shots: int | None, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to train on and rows to choose settings by.

    Raises:
        UserError: a class has too few samples.
    """
    labels = problem.train.labels
    counts = torch.bincount(labels, minlength=len(problem.classnames))
    scarce = int(counts.argmin())
    if counts[scarce] < (shots or 1):
        raise UserError(
            f"class {problem.classnames[scarce]!r} has {counts[scarce]} samples to train on, {shots or 1} are needed; "
            f"lower --shots, or leave the class out of the class names"
        )
    return probe.hold_out(labels, HELD_OUT, seed) if shots is None else probe.draw_shots(labels, shots, seed)


def fit_head(train: Labelled, rows: tuple[Tensor, Tensor], start: Linear, refit: bool) -> tuple[Linear, float]:
    """Logistic regression drawn to where it begins, and its C."""
    return probe.probe(train.features, train.labels, rows, len(start.bias), refit=refit, centre=start)


def right(logits: Tensor, labels: Tensor) -> Right:
    """1 where the highest logit of a row is its label's, else 0."""
    found: Right = (logits.argmax(1) == labels).numpy().astype(np.float64)
    return found


def accuracy_interval(hits: Right) -> Interval:
    """The 95 % bootstrap interval of an accuracy."""
    return bootstrap(lambda rows: {"acc1": float(hits[rows].mean())}, len(hits))["acc1"]


def encode_again(model: Model, judged: Labelled, progress: Progress | None = None) -> Tensor:
    """The features of another model, [N, D]."""
    wanted = {sample.id for sample in judged.samples}
    samples = (sample for sample in read_again(judged.dataset) if sample.id in wanted)
    return encode_images(model, samples, progress=progress).features


def _trained(
    model: Model,
    problem: FineTuneData,
    rows: tuple[Tensor, Tensor],
    heads: tuple[Linear, Linear],
    settings: FineTuneSettings,
    progress: Progress | None,
) -> tuple[Model, Linear, float]:
    """The model and the head after training both, and the learning rate.

    Args:
        heads: the zero-shot one, and the one to begin with.
    """
    zero, start = (head.weights.float() / model.logit_scale for head in heads)
    tower = model.image_module()
    module = HeadedTower(tower, start, model.logit_scale, heads[1].bias.float()).to(model.device).eval()
    pretrained = module.weights() | {"head": zero.to(model.device), "bias": heads[0].bias.float().to(model.device)}
    shown, held_out = (problem.train.shown(model, part) for part in rows)
    lr = tune(
        module,
        shown,
        held_out,
        rates=settings.rates,
        epochs=settings.epochs,
        seed=settings.seed,
        progress=progress,
    )
    module.load_state_dict(mixed(pretrained, module.weights(), settings.alpha))
    head = Linear(model.logit_scale * module.head.detach().double().cpu(), module.bias.detach().double().cpu())
    return _with_tower(model, tower), head, lr


def _with_tower(model: Model, tower: ImageEncoder) -> Model:
    """The model with a trained image tower."""
    encoder = copy.deepcopy(model.encoder)
    encoder.vision.load_state_dict(tower.vision.state_dict())
    encoder.image_projection.load_state_dict(tower.projection.state_dict())
    return Model(encoder, model.tokenizer, model.config, [*model.notes, "its image tower was fine-tuned"])
