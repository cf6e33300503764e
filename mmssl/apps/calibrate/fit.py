"""The fit of a calibration on half of the trials, and its measurement on the other half."""

from collections.abc import Sequence

import numpy as np
import torch

from mmssl.apps.calibrate.measure import Measurement, measure
from mmssl.apps.calibrate.trials import By, Head, Trials, trials_of
from mmssl.errors import UserError
from mmssl.evaluate import Metrics, datasets, suite
from mmssl.evaluate.metrics import calibration
from mmssl.inference import Model, probabilities
from mmssl.rng import generator

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
    halves: int = 1,
    options: suite.SuiteOptions | None = None,
    head: Head | None = None,
) -> probabilities.Calibration:
    """Fit a calibration on a random half of held-out images, and measure it on the other half.

    Args:
        dataset: images with labels or captions that the model was not trained on.
        by: the candidates that images are compared with. Default: see `trials_of`.
        coverage: probability with which the thresholds let the right one pass.
        seed: of the halves.
        halves: number of random halves to measure on. More than one: `halves` in the metrics has the mean over them.
        head: of a classifier, which is calibrated in place of the model.

    Raises:
        UserError: the data cannot be used, or are too few.
    """
    found = trials_of(model, dataset, by, options, head)
    count = len(found.right)
    needed = max(LEAST, 2 * int(np.ceil(1 / (1 - coverage))))
    if count < needed:
        raise UserError(
            f"{dataset.name} has {count} usable images; a calibration with {coverage:.0%} coverage needs {needed}: "
            "half of them to fit, half to measure"
        )
    mine, others = split(found, seed)
    fitted, scale = fit(mine, coverage), model.logit_scale if head is None else 1.0
    metrics = measure(fitted, others, scale)
    if halves > 1:
        metrics["halves"] = over_halves(found, coverage, scale, range(seed, seed + halves))
    return fitted.model_copy(update={"metrics": metrics})


def fit(trials: Trials, coverage: float = COVERAGE) -> probabilities.Calibration:
    """The calibration of trials. Matches weigh as much as mismatches, known images as much as unknown ones.

    An image becomes an unknown one when its right label is left out of the candidates.
    """
    own, others = trials.own(), trials.others()
    scale, curve = calibration.fit_curve(trials.similarities, trials.right)
    scores = torch.cat([own, others.flatten()])
    right = torch.arange(len(scores)) < len(own)
    weights = torch.where(right, 1.0, 1 / others.shape[1])
    match = calibration.fit_sigmoid(scores, right, weights)
    known, unknown = trials.familiarities(scale, curve)
    both = torch.cat([known, unknown])
    fits = calibration.fit_sigmoid(both, torch.arange(len(both)) < len(known))
    chances = (
        (scale * calibration.bend(trials.similarities.double(), curve))
        .softmax(dim=1)
        .gather(1, trials.right[:, None])[:, 0]
    )
    return probabilities.Calibration(
        data=trials.name,
        samples=len(own),
        label_scale=scale,
        label_curve=curve,
        match_scale=match.scale,
        match_bias=match.bias,
        known_scale=fits.scale,
        known_bias=fits.bias,
        coverage=coverage,
        match_threshold=calibration.conformal_threshold(own, coverage),
        label_threshold=calibration.conformal_threshold(chances, coverage),
        metrics={},
    )


def split(trials: Trials, seed: int) -> tuple[Trials, Trials]:
    """A random half to fit on, and the other half to measure on. They share no image."""
    order = torch.from_numpy(generator(seed, "halves").permutation(len(trials.right)))
    return trials.rows(order[: len(order) // 2]), trials.rows(order[len(order) // 2 :])


def over_halves(trials: Trials, coverage: float, logit_scale: float, seeds: Sequence[int]) -> Metrics:
    """The mean of each metric over random halves, each fitted by itself and measured on its other half.

    The interval holds 95 % of the halves: one calibration on as many images has a metric in it.
    """
    found = []
    for seed in seeds:
        mine, others = split(trials, seed)
        measurement = Measurement(fit(mine, coverage), others, logit_scale)
        found.append(measurement.values(np.arange(len(others.right))) | measurement.perfect(seed))
    columns = {name: [values[name] for values in found] for name in found[0]}
    return {
        **{name: float(np.mean(column)) for name, column in columns.items()},
        "halves": len(found),
        "intervals": {name: np.percentile(column, (2.5, 97.5)).tolist() for name, column in columns.items()},
    }
