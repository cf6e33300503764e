"""What a mix changes against the baseline: paired over seeds, with intervals, and in words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from mmssl.apps.ablate.results import MixResults
from mmssl.stats import LEVEL, Interval, Paired, bootstrap, holm, paired_t

Verdict = Literal["helps", "hurts", "no difference", "too few runs"]
LOWER_IS_BETTER = ("calibration_error", "median_rank")
NO_RATE = ("median_rank",)
"""Figures that are not shown in percent."""


@dataclass(frozen=True)
class MixComparison:
    """One mix against the baseline in one figure."""

    mix: str
    suite: str
    """`suite/task`."""
    figure: str
    seeds: tuple[int, ...]
    """Those finished in both."""
    baseline: tuple[float, ...]
    """One value a seed."""
    values: tuple[float, ...]
    """The mix's, one a seed."""
    paired: Paired | None
    """None with fewer than two seeds."""
    samples: int | None
    """Of the suite, where the runs kept what became of each."""
    over_samples: Interval | None
    """Of the same mean difference, from a bootstrap over the suite's samples."""
    verdict: Verdict
    holds_after_holm: bool = False
    """The difference over seeds stays significant when all comparisons are counted (Holm 1979)."""


def compare_mixes(
    cells: Mapping[str, Mapping[int, MixResults]], figures: Sequence[tuple[str, str]], mixes: Sequence[str]
) -> list[MixComparison]:
    """Each mix against the first one, in each figure of each suite."""
    found = [
        _compare(mix, suite, figure, cells[mixes[0]], cells[mix]) for suite, figure in figures for mix in mixes[1:]
    ]
    tested = [(i, c.paired.p_value) for i, c in enumerate(found) if c.paired is not None]
    for (i, _), holds in zip(tested, holm([p for _, p in tested]), strict=True):
        found[i] = replace(found[i], holds_after_holm=holds)
    return found


def sentence(c: MixComparison) -> str:
    """One honest sentence: the verdict with the figures it rests on."""
    about = f"{c.mix}, {c.suite} {c.figure}"
    if c.paired is None:
        return f"{about}: too few runs to say anything ({len(c.seeds)} finished in pairs; 2 are needed)."
    bounds = [(f"{len(c.seeds)} runs each", f"{len(c.seeds)} seeds", c.paired.interval)]
    if c.over_samples is not None:
        bounds.append((f"{c.samples:,} samples", f"{c.samples:,} samples", c.over_samples))
    holding = " and ".join(what for what, _, (low, high) in bounds if low <= 0 <= high)
    verdict = f"no difference that {holding} can show" if c.verdict == "no difference" else c.verdict
    means = " to ".join(show_value(c.figure, sum(v) / len(v)) for v in (c.baseline, c.values))
    intervals = ", ".join(f"over {over} {show_interval(c.figure, interval)}" for _, over, interval in bounds)
    change = show_change(c.figure, c.paired.mean)
    return f"{about}: {verdict}: {change}, from {means} ({LEVEL:.0%} interval {intervals})."


def show_value(figure: str, value: float) -> str:
    """A figure as printed: rates in percent."""
    return f"{value:.1f}" if figure.endswith(NO_RATE) else f"{100 * value:.2f} %"


def show_change(figure: str, value: float) -> str:
    """A difference of figures with its sign: of rates in percentage points."""
    return f"{value:+.1f}" if figure.endswith(NO_RATE) else f"{100 * value:+.2f} points"


def show_interval(figure: str, interval: Interval) -> str:
    """The ends of an interval of a difference."""
    scale = 1 if figure.endswith(NO_RATE) else 100
    return f"{scale * interval[0]:+.2f} to {scale * interval[1]:+.2f}"


def decide(figure: str, paired: Paired | None, over_samples: Interval | None) -> Verdict:
    """A difference is one if no interval at hand holds 0: neither that over seeds nor that over samples."""
    if paired is None:
        return "too few runs"
    intervals = [paired.interval, *([] if over_samples is None else [over_samples])]
    sign = -1 if figure.endswith(LOWER_IS_BETTER) else 1
    if all(sign * low > 0 and sign * high > 0 for low, high in intervals):
        return "helps"
    if all(sign * low < 0 and sign * high < 0 for low, high in intervals):
        return "hurts"
    return "no difference"


def _compare(
    mix: str, suite: str, figure: str, baseline: Mapping[int, MixResults], others: Mapping[int, MixResults]
) -> MixComparison:
    seeds = tuple(seed for seed in baseline if seed in others)
    first, second = (tuple(float(m[seed].results[suite][figure]) for seed in seeds) for m in (baseline, others))
    paired = paired_t([b - a for a, b in zip(first, second, strict=True)]) if len(seeds) > 1 else None
    samples, over_samples = _over_samples(suite, figure, [(baseline[s], others[s]) for s in seeds])
    verdict = decide(figure, paired, over_samples)
    return MixComparison(mix, suite, figure, seeds, first, second, paired, samples, over_samples, verdict)


def _over_samples(
    suite: str, figure: str, pairs: Sequence[tuple[MixResults, MixResults]]
) -> tuple[int | None, Interval | None]:
    """Number of samples, and interval of the mean difference if these same runs were judged on other samples."""
    if not pairs or any(figure not in m.outcomes.get(suite, ([], {}))[1] for pair in pairs for m in pair):
        return None, None
    changes = [second.outcomes[suite][1][figure] - first.outcomes[suite][1][figure] for first, second in pairs]
    change = np.mean(changes, axis=0)
    found = bootstrap(lambda rows: {"mean": float(change[rows].mean())}, len(change))
    return len(change), found["mean"]
