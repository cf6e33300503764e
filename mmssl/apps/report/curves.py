"""The curves of the page, from the records of training steps."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mmssl.apps.report.run_reader import Row, RunRecord

POINTS = 300
"""Most points of a curve; each is the mean of its neighbours."""
SPEED = ("samples_per_s", "data_wait", "mb_per_s")
NO_CURVE = {"step", "samples", "seconds", "fraction", "alarm"}
TITLES = {
    "loss": "Total loss",
    "samples_per_s": "Throughput, pairs per second",
    "data_wait": "Fraction of the time spent waiting for data",
    "mb_per_s": "Read from the shards, MB per second",
    "lr": "Learning rate",
    "gradient_norm": "Norm of the gradient",
}


@dataclass(frozen=True)
class Series:
    """The line of one run."""

    run: str
    x: list[float]
    y: list[float]


@dataclass(frozen=True)
class Chart:
    """One metric of all runs over the steps."""

    key: str
    title: str
    series: list[Series]

    def json(self) -> dict[str, Any]:
        """Data for the script of the page."""
        lines = [{"run": s.run, "x": s.x, "y": s.y} for s in self.series]
        return {"key": self.key, "title": self.title, "series": lines}

    @property
    def words(self) -> str:
        """Description for screen readers."""
        parts = [
            f"{s.run}: from {s.y[0]:.4g} at step {s.x[0]:.0f} to {s.y[-1]:.4g} at step {s.x[-1]:.0f}"
            for s in self.series
        ]
        return f"{self.title}. {'; '.join(parts)}."


@dataclass(frozen=True)
class Curves:
    """All charts by subject."""

    objectives: list[Chart]
    evaluation: list[Chart]
    speed: list[Chart]
    other: list[Chart]

    def all(self) -> list[Chart]:
        """Every chart."""
        return [*self.objectives, *self.evaluation, *self.speed, *self.other]


def build_curves(runs: Sequence[RunRecord]) -> Curves:
    """The charts of runs: losses and metrics of the objectives, accuracies during training, speed, and the rest."""
    keys = list(dict.fromkeys(key for run in runs for key in _keys(run.metrics) if key not in NO_CURVE))
    charts = {key: _chart(key, key, runs, [run.metrics for run in runs]) for key in keys}
    drawn = {key: chart for key, chart in charts.items() if chart.series}
    objectives = [k for k in drawn if k == "loss" or k.endswith((".loss", ".accuracy"))]
    if "loss" in drawn and len([k for k in objectives if k.endswith(".loss")]) == 1:
        objectives.remove("loss")  # one objective's loss is the total
    speed = [k for k in SPEED if k in drawn]
    hidden = {*objectives, *speed, "loss"}
    other = [k for k in drawn if k not in hidden and not _flat(drawn[k])]
    objectives.sort(key=lambda k: (k != "loss", not k.endswith(".loss"), k))
    return Curves(
        objectives=[drawn[k] for k in objectives],
        evaluation=_evaluation_charts(runs),
        speed=[drawn[k] for k in speed],
        other=[drawn[k] for k in other],
    )


def _evaluation_charts(runs: Sequence[RunRecord]) -> list[Chart]:
    """Main metrics of the evaluations during training. A single evaluation at the end is not a curve."""
    rows = [[_flatten(entry) for entry in run.evaluations] for run in runs]
    keys = list(dict.fromkeys(key for of_run in rows for row in of_run for key in row if key != "step"))
    charts = [_chart(key, key, runs, rows) for key in keys if key.endswith(("/acc1", "recall@1", "average_precision"))]
    return [chart for chart in charts if any(len(series.x) > 1 for series in chart.series)]


def _flatten(entry: Row) -> Row:
    results = entry.get("results", {})
    flat = {f"{key}/{name}": value for key, metrics in results.items() for name, value in metrics.items()}
    return {"step": entry.get("step"), **{key: value for key, value in flat.items() if _is_number(value)}}


def _chart(key: str, title: str, runs: Sequence[RunRecord], rows: Sequence[Sequence[Row]]) -> Chart:
    series = []
    for run, of_run in zip(runs, rows, strict=True):
        points = [(float(row["step"]), float(row[key])) for row in of_run if _is_number(row.get(key))]
        if points:
            x, y = thinned(points)
            series.append(Series(run.name, x, y))
    return Chart(key, TITLES.get(title, title.replace(".", ": ").replace("_", " ")), series)


def thinned(points: Sequence[tuple[float, float]], limit: int = POINTS) -> tuple[list[float], list[float]]:
    """At most `limit` points: means of groups of equal size, rounded to five digits."""
    each = -(-len(points) // limit)
    parts = [points[start : start + each] for start in range(0, len(points), each)]
    means = [[_mean(values) for values in zip(*part, strict=True)] for part in parts]
    return [float(f"{x:.7g}") for x, _ in means], [float(f"{y:.5g}") for _, y in means]


def _mean(values: Iterable[float]) -> float:
    kept = list(values)
    return math.fsum(kept) / len(kept)


def _keys(rows: Sequence[Row]) -> Iterable[str]:
    return dict.fromkeys(key for row in rows for key, value in row.items() if _is_number(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _flat(chart: Chart) -> bool:
    """True if a metric never changes, such as the number of bad samples in clean data; it needs no chart."""
    return all(min(s.y) == max(s.y) for s in chart.series)
