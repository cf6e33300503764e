"""The choice of a run's best step, and of the moments that a report compares."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from mmssl.apps.ablate.moments import at_best_step, best_evaluation, find_moments
from mmssl.apps.ablate.results import EvaluationPoint

ACC = ("a/zero_shot", "acc1")


def evaluations(*values: float, minutes: float = 1.0) -> tuple[EvaluationPoint, ...]:
    """One evaluation every 10 steps of `minutes` each."""
    return tuple(
        EvaluationPoint(
            10 * (i + 1), 80 * (i + 1), minutes * (i + 1), {"a/zero_shot": {"acc1": v, "calibration_error": v}}
        )
        for i, v in enumerate(values)
    )


@dataclass(frozen=True)
class Cost:
    minutes: float


@dataclass(frozen=True)
class Run:
    """The part of a finished run that moments read."""

    evaluations: tuple[EvaluationPoint, ...]
    outcomes: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    results: dict[str, Any] = field(default_factory=dict)

    @property
    def cost(self) -> Cost:
        return Cost(self.evaluations[-1].minutes)


def run(*values: float, minutes: float = 1.0) -> Any:
    found = evaluations(*values, minutes=minutes)
    return Run(found, {"a/zero_shot": (["x"], {"acc1": np.array(values[-1:])})}, found[-1].step, found[-1].results)


@pytest.mark.parametrize(
    ("metric", "most", "step"),
    [("acc1", 99.0, 20), ("acc1", 1.5, 10), ("calibration_error", 99.0, 30), ("acc1", 0.5, None), ("x", 99.0, None)],
)
def test_the_best_evaluation_is_the_first_with_the_best_value(metric: str, most: float, step: int | None) -> None:
    """Highest accuracy or lowest error, the earlier of equal ones, within the minutes; None without any."""
    found = best_evaluation(evaluations(0.2, 0.5, 0.1, 0.5), ("a/zero_shot", metric), most)
    assert (found.step if found else None) == step


def test_runs_are_shown_as_their_best_step_found_them() -> None:
    """Its results, no outcome of the last step's samples; a run without an evaluation in time is left out."""
    results: Any = {"contrastive": {0: run(0.2, 0.5, 0.1)}, "slow": {0: run(0.1, 0.9, minutes=5.0)}}
    best = at_best_step(results, ACC)
    assert [(r.step, r.results["a/zero_shot"]["acc1"], r.outcomes) for r in best["contrastive"].values()] == [
        (20, 0.5, {})
    ]
    early = at_best_step(results, ACC, most_minutes=3.0)
    assert (list(early["contrastive"]), list(early["slow"])) == ([0], [])


def test_equal_minutes_end_with_the_fastest_mix() -> None:
    """A mix of twice the time per step loses half of its evaluations there, and wins at its best step."""
    results: Any = {
        "contrastive": {seed: run(0.2, 0.5, 0.4) for seed in (0, 1)},
        "slow": {seed: run(0.1, 0.6, 0.8, minutes=2.0) for seed in (0, 1)},
    }
    end, best, equal = find_moments(results, [ACC], list(results), ACC)
    assert [m.steps("slow") for m in (end, best, equal)] == [[30, 30], [30, 30], [10, 10]]
    assert [m.steps("contrastive") for m in (end, best, equal)] == [[30, 30], [20, 20], [20, 20]]
    assert [m.comparisons[0].values for m in (end, best, equal)] == [(0.8, 0.8), (0.8, 0.8), (0.1, 0.1)]
    assert "3 minutes" in equal.note


def test_runs_evaluated_once_have_their_end_only() -> None:
    """And so have runs of equal length no separate view of equal minutes, nor an ablation without results any."""
    once: Any = {"contrastive": {0: run(0.2)}, "mlm": {0: run(0.3)}}
    assert [m.title for m in find_moments(once, [ACC], list(once), ACC)] == ["At the end"]
    equal: Any = {"contrastive": {0: run(0.2, 0.1)}, "mlm": {0: run(0.3, 0.2)}}
    assert [m.title for m in find_moments(equal, [ACC], list(equal), ACC)] == ["At the end", "At the best step"]
    assert [m.title for m in find_moments({"contrastive": {}}, [], ["contrastive"])] == ["At the end"]
