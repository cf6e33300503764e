"""Decisions from held-out metrics: the best step, and the end of a run that no longer improves."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mmssl.build import RunPlan, evaluation_names
from mmssl.evaluate import Metrics
from mmssl.train.state import RunState, Watch


@dataclass(frozen=True)
class HeldOut:
    """Follows the metric that picks the best step. Every process sees the same metrics, so all decide alike."""

    plan: RunPlan
    run: RunState
    say: Callable[[str], None]
    """Says a line to the user, on process 0."""

    def follow(self, results: Mapping[str, Metrics]) -> bool:
        """Take in the metrics of this step; an evaluation that is done again after a resume counts once.

        Returns: True if this step is the best so far.
        """
        counted = self.run.watch.last
        if counted is None or counted[1] < self.run.step:
            found = self._measured(results)
            if found is not None:
                self._count(*found)
        return self.run.best is not None and self.run.best[1] == self.run.step

    @property
    def ended(self) -> bool:
        """True if the metric has not improved for as many evaluations as the run waits."""
        stopping = self.plan.config.train.early_stopping
        return stopping is not None and self.run.watch.stale >= stopping.patience

    @property
    def wanted_step(self) -> int:
        """The step whose weights are to be exported: the best one with early stopping, else the last one."""
        if self.plan.config.train.early_stopping is None or self.run.best is None:
            return self.run.step
        return self.run.best[1]

    def record(self, exported: int) -> dict[str, Any] | None:
        """What best.json says: the metric, its values at the best and the last evaluated step, the step whose weights
        are exported, and whether the run ended early. None if the metric was never measured."""
        watch, best = self.run.watch, self.run.best
        if best is None or watch.last is None:
            return None
        values = {"best": best, "last": watch.last}
        return {
            "metric": watch.metric,
            **{name: {"step": step, "value": value} for name, (value, step) in values.items()},
            "exported_step": exported,
            "ended_early": self.ended,
        }

    def described(self) -> str:
        """The best step beside the last one, for the user."""
        watch, best = self.run.watch, self.run.best
        assert best is not None and watch.last is not None
        return (
            f"the model is that of step {best[1]}, the best one: {watch.metric} was {best[0]:.4g} there, and "
            f"{watch.last[0]:.4g} at step {watch.last[1]}"
        )

    def _measured(self, results: Mapping[str, Metrics]) -> tuple[str, float] | None:
        """Name and value of the metric; None if it is not measured, which is said."""
        wanted = self.plan.config.best_metric
        evaluation, _, metric = (wanted or "").rpartition("/")
        if wanted is None:
            evaluation = next(iter(evaluation_names(self.plan.suites)), "")
        if evaluation not in results:
            return None  # it failed, which was said
        values = {name: value for name, value in results[evaluation].items() if isinstance(value, (int, float))}
        metric = metric or _main(evaluation, values)
        if metric in values:
            return f"{evaluation}/{metric}", float(values[metric])
        key = "evaluate.best" if self.plan.config.evaluate.best is not None else "train.early_stopping.metric"
        known = ", ".join(f"{evaluation}/{name}" for name in values) or "none, as it measures no number"
        self.say(f"error: {key}={wanted!r} is not measured; choose one of: {known}")
        return None

    def _count(self, metric: str, value: float) -> None:
        """Compare a value with the best one, and with the one to improve on."""
        from mmssl.evaluate import compare  # a run without evaluation does not load it

        if self.run.watch.metric not in (None, metric):
            self.say(f"the best step is chosen anew, by {metric} in place of {self.run.watch.metric}")
            self.run.best, self.run.watch = None, Watch()
        watch, step = self.run.watch, self.run.step
        sign = -1 if metric.endswith(compare.LOWER_IS_BETTER) else 1
        watch.metric, watch.last = metric, (value, step)
        if math.isfinite(value) and (self.run.best is None or sign * (value - self.run.best[0]) > 0):
            self.run.best = (value, step)
        stopping = self.plan.config.train.early_stopping
        delta = 0.0 if stopping is None else stopping.min_delta
        if math.isfinite(value) and (watch.reference is None or sign * (value - watch.reference) > delta):
            watch.reference, watch.stale = value, 0
        else:
            watch.stale += 1
        if self.ended:
            shown = "no number" if watch.reference is None else f"{watch.reference:.4g}"
            self.say(
                f"early stopping at step {step}: {metric} has not improved on {shown} in {watch.stale} "
                f"evaluations (train.early_stopping)"
            )


def _main(evaluation: str, metrics: Mapping[str, float]) -> str:
    """The main metric of an evaluation; of a task that names none, the first one."""
    from mmssl.evaluate.tasks import main_metrics

    names = [name for name in main_metrics(evaluation.rpartition("/")[2]) if name in metrics]
    return (names or [*metrics, ""])[0]
