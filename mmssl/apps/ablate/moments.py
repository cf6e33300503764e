"""Results at a chosen moment of the runs: at the end, at the best step by held-out data, or within equal minutes."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mmssl.apps.ablate.results import (
    EvaluationPoint,
    MixComparison,
    Results,
    RunResults,
    compare_mixes,
)
from mmssl.evaluate.tasks import direction

Metric = tuple[str, str]
"""`suite/task` and the name of a metric."""


@dataclass(frozen=True)
class Moment:
    """All runs at one moment of each, and the comparison there."""

    title: str
    note: str
    """How the moment is chosen."""
    results: Results
    comparisons: Sequence[MixComparison]

    def steps(self, mix: str) -> list[int]:
        """The step of each finished seed."""
        return [run.step for run in self.results[mix].values()]


def find_moments(
    results: Results, metrics: Sequence[Metric], mixes: Sequence[str], chosen_by: Metric | None = None
) -> list[Moment]:
    """The end of the runs; and, where they were evaluated during the training, their best step and equal minutes.

    Args:
        metrics: those to compare.
        mixes: names, the baseline first.
        chosen_by: the metric whose best value picks the step of a run; None if nothing was measured.
    """
    end = Moment("At the end", "After the last step of each run.", results, compare_mixes(results, metrics, mixes))
    runs = [run for seeds in results.values() for run in seeds.values()]
    if chosen_by is None or not any(len(run.evaluations) > 1 for run in runs):
        return [end]
    name = " ".join(chosen_by)
    note = (
        f"Each run at the step with its best {name}. The choice flatters this metric, for every mix alike: it is made "
        f"on the data that it is then shown for."
    )
    best = at_best_step(results, chosen_by)
    moments = [end, Moment("At the best step", note, best, compare_mixes(best, metrics, mixes))]
    minutes = min(statistics.fmean(r.cost.minutes for r in seeds.values()) for seeds in results.values() if seeds)
    if all(run.cost.minutes <= 1.05 * minutes for run in runs):
        return moments
    note = (
        f"Each run at the step with its best {name} among those of its first {minutes:.3g} minutes of training steps, "
        f"which is all that the fastest mix needed. A learning rate that falls to the end of a run is still high there."
    )
    early = at_best_step(results, chosen_by, minutes)
    return [*moments, Moment("Within equal minutes", note, early, compare_mixes(early, metrics, mixes))]


def at_best_step(results: Results, chosen_by: Metric, most_minutes: float = math.inf) -> Results:
    """Each run as the best of its evaluations found it. Runs without any within the minutes are left out."""
    found: dict[str, dict[int, RunResults]] = {}
    for mix, seeds in results.items():
        found[mix] = {}
        for seed, run in seeds.items():
            best = best_evaluation(run.evaluations, chosen_by, most_minutes)
            if best is not None:
                found[mix][seed] = replace(run, results=best.results, outcomes={}, step=best.step)
    return found


def best_evaluation(
    evaluations: Sequence[EvaluationPoint], chosen_by: Metric, most_minutes: float
) -> EvaluationPoint | None:
    """The first evaluation with the best value; None if none has the metric."""
    suite, metric = chosen_by
    sign = direction(metric)
    known = [e for e in evaluations if e.minutes <= most_minutes and metric in e.results.get(suite, {})]
    return max(known, key=lambda e: sign * float(e.results[suite][metric]), default=None)
