"""Results of finished runs, and the paired comparison of each mix with the baseline."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from mmssl.apps.ablate.plan import AblationPlan, AblationRun, PlannedMix
from mmssl.errors import UserError
from mmssl.evaluate import Metrics, compare
from mmssl.evaluate.tasks import direction, main_metrics
from mmssl.files import read_json_lines
from mmssl.stats import LEVEL, Interval, Paired, bootstrap, holm, paired_t

Verdict = Literal["helps", "hurts", "no difference", "too few runs"]
NOT_A_RATE = ("median_rank",)
"""Metrics that are not shown in percent."""


@dataclass(frozen=True)
class RunCost:
    """The resources that one run used."""

    minutes: float
    """Time in training steps."""
    steps: int
    samples: int
    """Samples seen in training, repetitions included."""
    operations: float
    """Floating-point operations of the training, from the counted cost per step."""
    peak_memory_bytes: int
    peak_gpu_memory_bytes: int | None
    device: str
    threads: int

    @property
    def samples_per_second(self) -> float:
        """Speed in training steps."""
        return self.samples / (60 * self.minutes)

    @property
    def operations_per_sample(self) -> float:
        """Mean over the steps."""
        return self.operations / self.samples


@dataclass(frozen=True)
class EvaluationPoint:
    """One evaluation of a run."""

    step: int
    samples: int
    """Samples seen before it, repetitions included."""
    minutes: float
    """Minutes of training steps before it."""
    results: dict[str, Metrics]
    """`suite/task` -> metrics."""


@dataclass(frozen=True)
class RunResults:
    """A finished run, as one of its evaluations found it."""

    run: AblationRun
    results: dict[str, Metrics]
    """`suite/task` -> metrics."""
    outcomes: dict[str, compare.Outcomes]
    """`suite/task` -> recorded outcome of each sample; empty for evaluations during the training."""
    cost: RunCost
    evaluations: tuple[EvaluationPoint, ...]
    """All evaluations in their order; the last one is that of the trained model."""
    step: int
    """The step whose results these are."""


Results = Mapping[str, Mapping[int, RunResults]]
"""Mix -> seed -> finished run."""


def read_runs(plan: AblationPlan) -> dict[str, dict[int, RunResults]]:
    """Read the finished runs of each mix, by seed."""
    return {
        planned.mix.name: {run.seed: _read(planned, run) for run in planned.runs if run.is_finished}
        for planned in plan.mixes
    }


def choose_metrics(requested: Sequence[str], results: Results) -> list[tuple[str, str]]:
    """Pairs of `suite/task` and metric to compare: the requested ones, or the main one of each suite.

    Args:
        requested: metric names, for all suites that have them, or `suite/task/metric`.

    Raises:
        UserError: no suite has such a metric.
    """
    measured = next((run for seeds in results.values() for run in seeds.values()), None)
    if measured is None:
        return []
    known = {
        suite: [name for name, value in metrics.items() if isinstance(value, float)]
        for suite, metrics in measured.results.items()
    }
    if not requested:
        return [
            (suite, next((m for m in main_metrics(suite.rpartition("/")[2]) if m in names), names[0]))
            for suite, names in known.items()
        ]
    chosen: dict[tuple[str, str], None] = {}
    for name in requested:
        found = [
            (suite, metric)
            for suite, names in known.items()
            for metric in names
            if name in (metric, f"{suite}/{metric}")
        ]
        if not found:
            available = "; ".join(f"{suite}: {', '.join(names)}" for suite, names in known.items())
            raise UserError(f"--metric {name!r} was not measured; choose from {available}")
        chosen |= dict.fromkeys(found)
    return list(chosen)


@dataclass(frozen=True)
class MixComparison:
    """One mix compared with the baseline in one metric."""

    mix: str
    suite: str
    """`suite/task`."""
    metric: str
    seeds: tuple[int, ...]
    """Seeds finished in both."""
    baseline: tuple[float, ...]
    """One value per seed."""
    values: tuple[float, ...]
    """Values of the mix, one per seed."""
    paired: Paired | None
    """Paired test over seeds; None with fewer than two seeds."""
    samples: int | None
    """Samples of the suite, if the runs recorded an outcome for each."""
    over_samples: Interval | None
    """Interval of the same mean difference, from a bootstrap over the suite's samples."""
    verdict: Verdict
    holds_after_holm: bool = False
    """The difference over seeds stays significant after correction for all comparisons (Holm 1979). False with two
    seeds, from which no p-value is computed."""


def compare_mixes(results: Results, metrics: Sequence[tuple[str, str]], mixes: Sequence[str]) -> list[MixComparison]:
    """Compare each mix with the first one, in each metric of each suite."""
    found = [
        _compare(mix, suite, metric, results[mixes[0]], results[mix]) for suite, metric in metrics for mix in mixes[1:]
    ]
    tested = [
        (i, c.paired.p_value)
        for i, c in enumerate(found)
        if c.paired is not None and len(c.seeds) >= compare.LEAST_DRAWS
    ]
    for (i, _), holds in zip(tested, holm([p for _, p in tested]), strict=True):
        found[i] = replace(found[i], holds_after_holm=holds)
    return found


def sentence(c: MixComparison) -> str:
    """The verdict in one sentence, with the values and intervals behind it."""
    about = f"{c.mix}, {c.suite} {c.metric}"
    if c.paired is None:
        return f"{about}: too few runs to compare ({len(c.seeds)} finished in pairs; 2 are needed)."
    bounds = [(f"{len(c.seeds)} runs each", f"{len(c.seeds)} seeds", c.paired.interval)]
    if c.over_samples is not None:
        bounds.append((f"{c.samples:,} samples", f"{c.samples:,} samples", c.over_samples))
    holding = " and ".join(source for source, _, (low, high) in bounds if low <= 0 <= high)
    verdict = f"no difference that {holding} can show" if c.verdict == "no difference" else c.verdict
    means = " to ".join(format_value(c.metric, sum(v) / len(v)) for v in (c.baseline, c.values))
    intervals = ", ".join(f"over {over} {format_interval(c.metric, interval)}" for _, over, interval in bounds)
    change = format_change(c.metric, c.paired.mean)
    return f"{about}: {verdict}: {change}, from {means} ({LEVEL:.0%} interval {intervals})."


def format_value(metric: str, value: float) -> str:
    """A metric as text: rates in percent."""
    return f"{value:.1f}" if metric.endswith(NOT_A_RATE) else f"{100 * value:.2f} %"


def format_change(metric: str, value: float) -> str:
    """A signed difference as text: of rates in percentage points."""
    return f"{value:+.1f}" if metric.endswith(NOT_A_RATE) else f"{100 * value:+.2f} points"


def format_interval(metric: str, interval: Interval) -> str:
    """The interval of a difference as text."""
    scale = 1 if metric.endswith(NOT_A_RATE) else 100
    return f"{scale * interval[0]:+.2f} to {scale * interval[1]:+.2f}"


def decide(metric: str, paired: Paired | None, over_samples: Interval | None) -> Verdict:
    """The verdict: a difference counts only if no interval, over seeds or over samples, contains 0."""
    if paired is None:
        return "too few runs"
    intervals = [paired.interval, *([] if over_samples is None else [over_samples])]
    sign = direction(metric)
    if all(sign * low > 0 and sign * high > 0 for low, high in intervals):
        return "helps"
    if all(sign * low < 0 and sign * high < 0 for low, high in intervals):
        return "hurts"
    return "no difference"


def _compare(
    mix: str, suite: str, metric: str, baseline: Mapping[int, RunResults], others: Mapping[int, RunResults]
) -> MixComparison:
    seeds = tuple(seed for seed in baseline if seed in others)
    first, second = (tuple(float(runs[seed].results[suite][metric]) for seed in seeds) for runs in (baseline, others))
    paired = paired_t([b - a for a, b in zip(first, second, strict=True)]) if len(seeds) > 1 else None
    samples, over_samples = _over_samples(suite, metric, [(baseline[s], others[s]) for s in seeds])
    verdict = decide(metric, paired, over_samples)
    return MixComparison(mix, suite, metric, seeds, first, second, paired, samples, over_samples, verdict)


def _over_samples(
    suite: str, metric: str, pairs: Sequence[tuple[RunResults, RunResults]]
) -> tuple[int | None, Interval | None]:
    """The number of samples, and the interval of the mean difference of these runs over other samples."""
    if not pairs or any(metric not in run.outcomes.get(suite, ([], {}))[1] for pair in pairs for run in pair):
        return None, None
    changes = [second.outcomes[suite][1][metric] - first.outcomes[suite][1][metric] for first, second in pairs]
    change = np.mean(changes, axis=0)
    found = bootstrap(lambda rows: {"mean": float(change[rows].mean())}, len(change))
    return len(change), found["mean"]


def _read(planned: PlannedMix, run: AblationRun) -> RunResults:
    results = json.loads((run.run_dir / "results.json").read_text(encoding="utf-8"))
    steps = read_json_lines(run.run_dir / "metrics.jsonl").rows
    batch = run.config.data.batch_size
    operations, fraction = 0.0, 0.0
    for step in steps:
        # The record of a step has a loss for each objective that was active.
        active = [name for name in planned.mix.objectives if f"{name}.loss" in step]
        operations += batch * planned.costs.of(active, fraction)
        fraction = step["fraction"]
    cost = RunCost(
        minutes=steps[-1]["seconds"] / 60,
        steps=len(steps),
        samples=len(steps) * batch,
        operations=operations,
        **json.loads(run.record.read_text(encoding="utf-8")),
    )
    evaluations = tuple(
        EvaluationPoint(row["step"], row["step"] * batch, row["seconds"] / 60, row["results"])
        for row in read_json_lines(run.run_dir / "evaluations.jsonl").rows
    )
    best = run.run_dir / "best.json"
    exported = json.loads(best.read_text(encoding="utf-8"))["exported_step"] if best.is_file() else len(steps)
    if exported != len(steps):  # early stopping: results.json is about the best step, not the last one
        return RunResults(run, evaluations[-1].results, {}, cost, evaluations, len(steps))
    return RunResults(run, results, compare.read_outcomes(run.run_dir), cost, evaluations, len(steps))
