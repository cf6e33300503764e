"""Decisions from held-out metrics: the best step, the end of a run that no longer improves, and a guard against
forgetting."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mmssl.build import RunPlan, evaluation_names
from mmssl.config import GuardConfig
from mmssl.errors import UserError
from mmssl.evaluate import Metrics
from mmssl.evaluate.tasks import direction, main_metrics
from mmssl.train.state import RunState, Watch


@dataclass(frozen=True)
class HeldOut:
    """Follows the metric that picks the best step, and the guard's. Every process sees the same metrics, so all decide
    alike."""

    plan: RunPlan
    run: RunState
    say: Callable[[str], None]
    """Says a line to the user, on process 0."""

    def follow(self, results: Mapping[str, Metrics]) -> bool:
        """Take in the metrics of this step; an evaluation that is done again after a resume counts once.

        Returns: True if this step is the best so far.

        Raises:
            UserError: the guard's metric is below its floor before the first step.
        """
        if self.run.watch.counted < self.run.step:
            self.run.watch.counted = self.run.step
            self._guard(results)
            self._compare(results)
        return self.run.best is not None and self.run.best[1] == self.run.step

    @property
    def ended(self) -> bool:
        """True if the metric has not improved for as many evaluations as the run waits, or the guard ended the run."""
        stopping, guard = self.plan.config.train.early_stopping, self.plan.config.train.guard
        impatient = stopping is not None and self.run.watch.stale >= stopping.patience
        return impatient or (guard is not None and guard.action == "stop" and self.fallen)

    @property
    def fallen(self) -> bool:
        """True if the guard's metric was below its floor at its last evaluation."""
        guard, watched = self.plan.config.train.guard, self.run.watch.guard
        if guard is None or watched is None:
            return False
        metric, start, last = watched
        return not direction(metric) * (last - _floor(guard, metric, start)) >= 0  # NaN has fallen

    @property
    def lacks_start(self) -> bool:
        """True if the run has to be evaluated before its first step, for the guard."""
        return self.plan.config.train.guard is not None and self.run.step == 0 and self.run.watch.counted < 0

    @property
    def wanted_step(self) -> int:
        """The step whose weights are to be exported: the best one with early stopping or below the guard's floor, else
        the last one."""
        keep_last = self.plan.config.train.early_stopping is None and not self.fallen
        return self.run.step if keep_last or self.run.best is None else self.run.best[1]

    def record(self, exported: int) -> dict[str, Any] | None:
        """The content of best.json: the metric, its values at the best and the last evaluated step, the step whose
        weights are exported, whether the run ended early, and the guard. None if the metric was never measured."""
        watch, best, guard = self.run.watch, self.run.best, self.plan.config.train.guard
        if best is None or watch.last is None:
            return None
        values = {"best": best, "last": watch.last}
        record: dict[str, Any] = {
            "metric": watch.metric,
            **{name: {"step": step, "value": value} for name, (value, step) in values.items()},
            "exported_step": exported,
            "ended_early": self.ended,
        }
        if guard is not None and watch.guard is not None:
            metric, start, last = watch.guard
            floor = _floor(guard, metric, start)
            known = {"metric": metric, "start": start, "last": last, "floor": floor}
            record["guard"] = {**known, "fallen": self.fallen, "lr_factor": watch.rate}
        return record

    def described(self) -> str:
        """The best step beside the last one, for the user."""
        watch, best = self.run.watch, self.run.best
        assert best is not None
        assert watch.last is not None
        above = " above the guard's floor" if self.plan.config.train.guard is not None else ""
        return (
            f"the model is that of step {best[1]}, the best one{above}: {watch.metric} was {best[0]:.4g} there, and "
            f"{watch.last[0]:.4g} at step {watch.last[1]}"
        )

    def _guard(self, results: Mapping[str, Metrics]) -> None:
        """Take in the guard's metric, and do what follows from a value below its floor."""
        guard, watch, step = self.plan.config.train.guard, self.run.watch, self.run.step
        if guard is None:
            return
        first_task = next(name for name in evaluation_names(self.plan.suites) if name.startswith(f"{guard.suite}/"))
        wanted = None if guard.metric is None else f"{guard.suite}/{guard.metric}"
        found = self._measured(results, "train.guard.metric", wanted, first_task)
        if found is None:
            return
        metric, value = found
        if watch.guard is None or watch.guard[0] != metric:
            floor = _floor(guard, metric, value)
            self.say(f"guard: {metric} is {value:.4g} at step {step}; the floor is {floor:.4g}")
            watch.guard = (metric, value, value)
            if self.fallen and step == 0:
                raise UserError(
                    f"train.guard: {metric} is {value:.4g} before the first step, below its floor of {floor:.4g}; "
                    f"lower train.guard.floor, or give train.guard.drop in its place"
                )
        watch.guard = (metric, watch.guard[1], value)
        if not self.fallen:
            return
        floor = _floor(guard, metric, watch.guard[1])
        if guard.action == "lower_rate":
            watch.rate *= guard.factor
            then = f"the learning rate is {watch.rate:.3g} of its schedule from here on"
        else:
            then = "the run ends"
        self.say(
            f"guard: {metric} is {value:.4g} at step {step}, below the floor of {floor:.4g} (it began at "
            f"{watch.guard[1]:.4g}): {then}"
        )

    def _compare(self, results: Mapping[str, Metrics]) -> None:
        """Compare the metric with the best value, and with the one to improve on."""
        config, step = self.plan.config, self.run.step
        key = "evaluate.best" if config.evaluate.best is not None else "train.early_stopping.metric"
        first = next(iter(evaluation_names(self.plan.suites)))
        found = self._measured(results, key, config.best_metric, first)
        if found is None:
            return
        metric, value = found
        if self.run.watch.metric not in (None, metric):
            self.say(f"the best step is chosen anew, by {metric} in place of {self.run.watch.metric}")
            kept = {name: getattr(self.run.watch, name) for name in ("guard", "rate", "counted")}
            self.run.best, self.run.watch = None, Watch(**kept)
        watch, sign = self.run.watch, direction(metric)
        watch.metric, watch.last = metric, (value, step)
        eligible = math.isfinite(value) and not self.fallen
        if eligible and (self.run.best is None or sign * (value - self.run.best[0]) > 0):
            self.run.best = (value, step)
        stopping = config.train.early_stopping
        delta = 0.0 if stopping is None else stopping.min_delta
        if eligible and (watch.reference is None or sign * (value - watch.reference) > delta):
            watch.reference, watch.stale = value, 0
        else:
            watch.stale += 1
        if stopping is not None and watch.stale >= stopping.patience:
            shown = "no number" if watch.reference is None else f"{watch.reference:.4g}"
            self.say(
                f"early stopping at step {step}: {metric} has not improved on {shown} in {watch.stale} evaluations "
                f"(train.early_stopping)"
            )

    def _measured(
        self, results: Mapping[str, Metrics], key: str, wanted: str | None, first: str
    ) -> tuple[str, float] | None:
        """Name and value of a metric; None if it is not measured, which is said.

        Args:
            key: the configuration key that names the metric.
            wanted: `SUITE/TASK/METRIC`. None: the main metric of the evaluation `first`.
        """
        evaluation, _, metric = (wanted or f"{first}/").rpartition("/")
        if evaluation not in results:
            return None  # it failed, which was said
        values = {name: value for name, value in results[evaluation].items() if isinstance(value, (int, float))}
        metric = metric or _main(evaluation, values)
        if metric in values:
            return f"{evaluation}/{metric}", float(values[metric])
        known = ", ".join(f"{evaluation}/{name}" for name in values) or "none, as it measures no number"
        self.say(f"error: {key}={wanted!r} is not measured; choose one of: {known}")
        return None


def _main(evaluation: str, metrics: Mapping[str, float]) -> str:
    """The main metric of an evaluation; of a task that names none, the first one."""
    names = [name for name in main_metrics(evaluation.rpartition("/")[2]) if name in metrics]
    return (names or [*metrics, ""])[0]


def _floor(guard: GuardConfig, metric: str, start: float) -> float:
    """The worst value that the guard allows, for a metric that began at `start`."""
    if guard.floor is not None:
        return guard.floor
    assert guard.drop is not None
    return start * (1 - direction(metric) * guard.drop)
