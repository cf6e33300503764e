"""Plots of an ablation: the differences between each mix and the baseline, and the metrics during the training."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mmssl.apps.ablate.results import NOT_A_RATE, EvaluationPoint, MixComparison, Results, RunResults
from mmssl.plotting import shortened, wrapped

COLORS = {"helps": "#1a7f37", "hurts": "#c93c37", "no difference": "#57606a", "too few runs": "#57606a"}


def draw_differences(path: Path, comparisons: Sequence[MixComparison], baseline: str) -> None:
    """Draw a PNG with one panel per suite and metric, one row per mix."""
    panels: dict[tuple[str, str], list[MixComparison]] = {}
    for c in comparisons:
        panels.setdefault((c.suite, c.metric), []).append(c)
    rows = max(map(len, panels.values()), default=0)
    labels = max((len(c.mix) for c in comparisons), default=0)
    figure = Figure(
        figsize=(1.2 + 0.075 * labels + 4.6 * len(panels), 1.5 + 0.45 * rows),
        dpi=130,
        facecolor="white",
        layout="constrained",
    )
    for place, ((suite, name), found) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), place + 1)
        _panel(axes, found, first=place == 0)
        unit = "" if name.endswith(NOT_A_RATE) else " (percentage points)"
        axes.set_title(wrapped(suite, 50, 2), fontsize=10, parse_math=False)
        label = wrapped(f"{name}: difference to {baseline}{unit}", 62, 2)
        axes.set_xlabel(label, fontsize=8.5, parse_math=False)
    figure.supxlabel(
        "circles: seeds; dot and thick line: mean and 95 % interval over seeds; thin line: over samples",
        fontsize=7.5,
        color="#57606a",
    )
    figure.savefig(path)


def _panel(axes: Axes, comparisons: Sequence[MixComparison], first: bool) -> None:
    axes.axvline(0, color="#8c959f", linewidth=1)
    for row, c in enumerate(comparisons):
        scale = 1 if c.metric.endswith(NOT_A_RATE) else 100
        color = COLORS[c.verdict]
        seeds = [scale * (b - a) for a, b in zip(c.baseline, c.values, strict=True)]
        axes.plot(seeds, [row] * len(seeds), "o", markersize=4.5, markerfacecolor="none", color=color, alpha=0.7)
        if c.over_samples is not None:
            axes.plot([scale * x for x in c.over_samples], [row + 0.22] * 2, color=color, linewidth=1)
        if c.paired is not None:
            axes.plot([scale * x for x in c.paired.interval], [row] * 2, color=color, linewidth=2.5, alpha=0.6)
            axes.plot([scale * c.paired.mean], [row], "o", markersize=7, color=color)
    names = [c.mix for c in comparisons] if first else [""] * len(comparisons)
    axes.set_yticks(range(len(comparisons)), names, fontsize=9, parse_math=False)
    axes.set_ylim(len(comparisons) - 0.5, -0.5)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", color="#eaeef2")
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def draw_curves(path: Path, results: Results, metrics: Sequence[tuple[str, str]]) -> None:
    """Draw a PNG with a column per suite and metric: over the samples seen above, over the minutes below.

    A line is the mean over the seeds, its band goes from the worst to the best seed.
    """
    axes_of: tuple[tuple[str, Callable[[EvaluationPoint], float]], ...] = (
        ("samples seen", lambda e: e.samples),
        ("minutes of training", lambda e: e.minutes),
    )
    figure = Figure(figsize=(1.5 + 4.4 * len(metrics), 7.5), dpi=130, facecolor="white", layout="constrained")
    lines = []
    for column, (suite, metric) in enumerate(metrics):
        for row, (unit, place) in enumerate(axes_of):
            axes = figure.add_subplot(2, len(metrics), row * len(metrics) + column + 1)
            lines = [
                _curve(axes, list(runs.values()), (suite, metric), place, colormaps["tab20"](number % 20))
                for number, runs in enumerate(results.values())
            ]
            axes.set_xlabel(unit, fontsize=8.5)
            axes.tick_params(labelsize=8)
            axes.grid(color="#eaeef2")
            if row == 0:
                axes.set_title(wrapped(f"{suite} {metric}", 52, 2), fontsize=9.5, parse_math=False)
    names = [shortened(mix, 80) for mix in results]
    beside = int(figure.get_figwidth() / (0.6 + 0.075 * max(map(len, names))))
    figure.legend(lines, names, loc="outside lower center", ncols=min(3, max(1, beside)), fontsize=8.5)
    figure.savefig(path)


def _curve(
    axes: Axes,
    runs: Sequence[RunResults],
    measured: tuple[str, str],
    place: Callable[[EvaluationPoint], float],
    color: tuple[float, float, float, float],
) -> Any:
    """The curve of one mix over the evaluations that all its seeds reached."""
    suite, metric = measured
    scale = 1 if metric.endswith(NOT_A_RATE) else 100
    found = [[e for e in run.evaluations if metric in e.results.get(suite, {})] for run in runs]
    length = min(map(len, found), default=0)
    values = np.array([[scale * float(e.results[suite][metric]) for e in run[:length]] for run in found])
    places = np.array([[place(e) for e in run[:length]] for run in found])
    if values.size == 0:
        return axes.plot([], [], color=color)[0]
    mean = places.mean(0)
    axes.fill_between(mean, values.min(0), values.max(0), color=color, alpha=0.15, linewidth=0)
    return axes.plot(mean, values.mean(0), color=color, linewidth=1.6, marker=".", markersize=4)[0]
