"""The measurement of a calibration on trials that it was not fitted on."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmssl.apps.calibrate.trials import Trials
from mmssl.evaluate import Metrics
from mmssl.evaluate.metrics import novelty, ranking
from mmssl.inference import probabilities
from mmssl.rng import generator
from mmssl.stats import Rows, bootstrap

PERFECT_DRAWS = 20
"""Draws of outcomes, whose mean calibration error is that of perfect probabilities."""


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

    def perfect_error(self, seed: int) -> float:
        """The mean calibration error if each claim were true with its probability, independently."""
        chances, rng = self.probabilities.flatten(), generator(seed, "outcomes")
        drawn = (torch.from_numpy(rng.random(len(chances))) < chances for _ in range(PERFECT_DRAWS))
        return float(np.mean([ranking.expected_calibration_error(chances, outcome) for outcome in drawn]))


class Measurement:
    """The metrics of `measure`, for any choice of the images."""

    def __init__(self, found: probabilities.Calibration, trials: Trials, logit_scale: float, seed: int = 0) -> None:
        """
        Args:
            logit_scale: the model's own factor from similarities to logits.
            seed: of the mismatches.
        """
        count, candidates = trials.similarities.shape
        others = trials.others()
        column = torch.from_numpy(generator(seed, "mismatches").integers(0, candidates - 1, count))
        mismatch = others.gather(1, column[:, None])[:, 0]
        after = found.label_probabilities(trials.similarities)
        self.known, self.unknown = trials.familiarities(found.label_scale, found.label_curve)
        fits = torch.stack([1 - found.none_probability(part) for part in (trials.similarities, others)], dim=1)
        truth = torch.tensor([True, False]).expand(count, 2)
        matches = found.match_probability(torch.stack([trials.own(), mismatch], dim=1))
        self.before = _best((logit_scale * trials.similarities.double()).softmax(1), trials.right)
        self.claims = {
            "label_calibration_error": _best(after, trials.right),
            "match_calibration_error": _Claims(matches, truth),
            "known_calibration_error": _Claims(fits, truth),
        }
        passes = after >= found.label_threshold
        self.shares = {
            "label_coverage": passes.gather(1, trials.right[:, None])[:, 0],
            "labels_per_image": passes.sum(dim=1),
            "match_coverage": trials.own() >= found.match_threshold,
            "mismatches_passed": (others >= found.match_threshold).double().mean(dim=1),
        }

    def values(self, rows: Rows) -> dict[str, float]:
        """The metrics over some of the images."""
        result = {"label_calibration_error_before": self.before.error(rows)}
        result |= {name: claim.error(rows) for name, claim in self.claims.items()}
        result |= {name: float(column[rows].double().mean()) for name, column in self.shares.items()}
        return result | {"unknown_auroc": novelty.auroc(self.known[rows], self.unknown[rows])}

    def perfect(self, seed: int = 0) -> dict[str, float]:
        """The calibration errors that perfect probabilities would show on as many images."""
        return {f"{name}_perfect": claim.perfect_error(seed) for name, claim in self.claims.items()}


def measure(found: probabilities.Calibration, trials: Trials, logit_scale: float, seed: int = 0) -> Metrics:
    """Metrics of a calibration on trials that it was not fitted on, with 95 % intervals over images.

    Calibration errors (15 bins) of the most probable label before and after, of matches (an image with its own text
    and with one other) and of "one of the labels fits" (with the right label and without it), each with the error that
    perfect probabilities would show; the coverage of both thresholds, how many labels and mismatches pass them; and how
    well familiarity tells images whose label is among the candidates from those whose label is left out.

    Args:
        logit_scale: the model's own factor from similarities to logits.
        seed: of the mismatches.
    """
    count, candidates = trials.similarities.shape
    measurement = Measurement(found, trials, logit_scale, seed)
    fractions = dict.fromkeys(("label_coverage", "match_coverage", "mismatches_passed"), count)
    intervals = bootstrap(measurement.values, count, fractions=fractions)
    return {
        **measurement.values(np.arange(count)),
        **measurement.perfect(),
        "samples": count,
        "candidates": candidates,
        "intervals": {name: list(interval) for name, interval in intervals.items()},
        "baselines": {"unknown_auroc": {"chance": 0.5}},
    }


def _best(chances: Tensor, right: Tensor) -> _Claims:
    """The claim of the most probable label."""
    best = chances.max(dim=1)
    return _Claims(best.values[:, None], (best.indices == right)[:, None])
