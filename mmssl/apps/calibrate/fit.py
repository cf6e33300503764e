"""The fit of a calibration on half of the trials, and its measurement on the other half."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmssl.apps.calibrate.trials import By, Trials, trials_of
from mmssl.errors import UserError
from mmssl.evaluate import Metrics, datasets, suite
from mmssl.evaluate.metrics import calibration, novelty, ranking
from mmssl.inference import Model, probabilities
from mmssl.rng import generator
from mmssl.stats import Rows, bootstrap

COVERAGE = 0.9
LEAST = 100
"""Images that a calibration needs: half of them are measured on."""


def calibrate(
    model: Model,
    dataset: datasets.Dataset,
    *,
    by: By | None = None,
    coverage: float = COVERAGE,
    seed: int = 0,
    options: suite.SuiteOptions | None = None,
) -> probabilities.Calibration:
    """Fit a calibration on a random half of held-out images, and measure it on the other half.

    Args:
        dataset: images with labels or captions that the model was not trained on.
        by: the candidates that images are compared with. Default: see `trials_of`.
        coverage: probability with which the thresholds let the right one pass.
        seed: of the halves.

    Raises:
        UserError: the data cannot be used, or are too few.
    """
    found = trials_of(model, dataset, by, options)
    count = len(found.right)
    needed = max(LEAST, 2 * int(np.ceil(1 / (1 - coverage))))
    if count < needed:
        raise UserError(
            f"{dataset.name} has {count} usable images; a calibration with {coverage:.0%} coverage needs {needed}: "
            "half of them to fit, half to measure"
        )
    order = torch.from_numpy(generator(seed, "halves").permutation(count))
    fitted = fit(found.rows(order[: count // 2]), coverage)
    metrics = measure(fitted, found.rows(order[count // 2 :]), model.logit_scale)
    return fitted.model_copy(update={"metrics": metrics})


def fit(trials: Trials, coverage: float = COVERAGE) -> probabilities.Calibration:
    """The calibration of trials. Matches weigh as much as mismatches, known images as much as unknown ones.

    An image becomes an unknown one when its right label is left out of the candidates.
    """
    own, others = trials.own(), trials.others()
    scale = calibration.fit_scale(trials.similarities, trials.right)
    scores = torch.cat([own, others.flatten()])
    right = torch.arange(len(scores)) < len(own)
    weights = torch.where(right, 1.0, 1 / others.shape[1])
    match = calibration.fit_sigmoid(scores, right, weights)
    known, unknown = familiarities(trials, scale)
    both = torch.cat([known, unknown])
    fits = calibration.fit_sigmoid(both, torch.arange(len(both)) < len(known))
    chances = (scale * trials.similarities.double()).softmax(dim=1).gather(1, trials.right[:, None])[:, 0]
    return probabilities.Calibration(
        data=trials.name,
        samples=len(own),
        label_scale=scale,
        match_scale=match.scale,
        match_bias=match.bias,
        known_scale=fits.scale,
        known_bias=fits.bias,
        coverage=coverage,
        match_threshold=calibration.conformal_threshold(own, coverage),
        label_threshold=calibration.conformal_threshold(chances, coverage),
        metrics={},
    )


def familiarities(trials: Trials, scale: float) -> tuple[Tensor, Tensor]:
    """The familiarity of images with the right candidate among the others, and without it. float64 [N] each."""
    return calibration.familiarity(trials.similarities, scale), calibration.familiarity(trials.others(), scale)


@dataclass(frozen=True)
class _Claims:
    """Probabilities, and whether what they claim is true."""

    probabilities: Tensor
    """[N, K], K claims per image."""
    true: Tensor
    """bool [N, K]."""

    def error(self, rows: Rows) -> float:
        """The calibration error over some of the images."""
        return ranking.expected_calibration_error(self.probabilities[rows].flatten(), self.true[rows].flatten())


def measure(found: probabilities.Calibration, trials: Trials, logit_scale: float, seed: int = 0) -> Metrics:
    """Metrics of a calibration on trials that it was not fitted on, with 95 % intervals over images.

    Calibration errors (15 bins) of the most probable label before and after, of matches (an image with its own text
    and with one other) and of "one of the labels fits" (with the right label and without it); the coverage of both
    thresholds, how many labels and mismatches pass them; and how well familiarity tells images whose label is among the
    candidates from those whose label is left out.

    Args:
        logit_scale: the model's own factor from similarities to logits.
        seed: of the mismatches.
    """
    count, candidates = trials.similarities.shape
    others = trials.others()
    column = torch.from_numpy(generator(seed, "mismatches").integers(0, candidates - 1, count))
    mismatch = others.gather(1, column[:, None])[:, 0]
    after = found.label_probabilities(trials.similarities)
    known, unknown = familiarities(trials, found.label_scale)
    fits = torch.stack([1 - found.none_probability(part) for part in (trials.similarities, others)], dim=1)
    truth = torch.tensor([True, False]).expand(count, 2)
    claims = {
        "label_calibration_error_before": _best((logit_scale * trials.similarities.double()).softmax(1), trials.right),
        "label_calibration_error": _best(after, trials.right),
        "match_calibration_error": _Claims(
            found.match_probability(torch.stack([trials.own(), mismatch], dim=1)), truth
        ),
        "known_calibration_error": _Claims(fits, truth),
    }
    passes = after >= found.label_threshold
    shares = {
        "label_coverage": passes.gather(1, trials.right[:, None])[:, 0],
        "labels_per_image": passes.sum(dim=1),
        "match_coverage": trials.own() >= found.match_threshold,
        "mismatches_passed": (others >= found.match_threshold).double().mean(dim=1),
    }

    def values(rows: Rows) -> dict[str, float]:
        result = {name: claim.error(rows) for name, claim in claims.items()}
        result |= {name: float(column[rows].double().mean()) for name, column in shares.items()}
        return result | {"unknown_auroc": novelty.auroc(known[rows], unknown[rows])}

    intervals = bootstrap(values, count)
    return {
        **values(np.arange(count)),
        "samples": count,
        "candidates": candidates,
        "intervals": {name: list(interval) for name, interval in intervals.items()},
        "baselines": {"unknown_auroc": {"chance": 0.5}},
    }


def _best(chances: Tensor, right: Tensor) -> _Claims:
    """The claim of the most probable label."""
    best = chances.max(dim=1)
    return _Claims(best.values[:, None], (best.indices == right)[:, None])
