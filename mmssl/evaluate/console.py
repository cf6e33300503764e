"""Results as text for a terminal."""

from collections.abc import Mapping, Sequence

from mmssl.evaluate.compare import Difference, significant
from mmssl.evaluate.metrics import baselines
from mmssl.evaluate.task import Metrics
from mmssl.evaluate.tasks import main_metrics
from mmssl.plotting import columns

COUNTS = ("classes", "samples")


def format_results(results: Mapping[str, Metrics]) -> str:
    """A table for a terminal: one line per evaluation, the main metrics in percent and the counts."""
    names = dict.fromkeys(
        name for key, metrics in results.items() for name in main_metrics(key.rpartition("/")[2]) if name in metrics
    )
    header = ["", *names, *COUNTS]
    lines = [
        [
            key,
            *(_percent(metrics.get(name)) for name in names),
            *(str(metrics.get(name, "")) for name in COUNTS),
        ]
        for key, metrics in results.items()
    ]
    return _aligned([header, *lines])


def format_differences(differences: Mapping[str, Difference]) -> str:
    """A table per evaluation, for a terminal of 80 columns: both values and their difference in percent; * marks
    significant ones (Holm, 5 %).

    Below stand the values of answers without the image: the most frequent class, and chance.
    """
    real = dict(zip(differences, significant(differences), strict=True))
    evaluations: dict[str, dict[str, str]] = {}
    for key in differences:
        evaluation, _, metric = key.rpartition("/")
        evaluations.setdefault(evaluation, {})[metric] = key
    blocks = []
    for evaluation, metrics in evaluations.items():
        rows = [_difference(metric, differences[key], real[key]) for metric, key in metrics.items()]
        table = _aligned([["", "first", "second", "change", "95 % interval", "p"], *rows])
        known = [(metric, differences[key].baselines) for metric, key in metrics.items() if differences[key].baselines]
        lines = [f"{metric} without the image: {_in_percent(found)}" for metric, found in known]
        blocks.append("\n".join([*([evaluation] if evaluation else []), table, *lines]))
    return "\n\n".join(blocks)


def _in_percent(found: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {100 * value:.2f} %" for name, value in found.items())


def _difference(metric: str, d: Difference, sure: bool) -> list[str]:
    return [
        metric,
        *map(_percent, (d.first, d.second)),
        f"{100 * d.difference:+.2f}",
        f"{100 * d.interval[0]:+.2f} to {100 * d.interval[1]:+.2f}",
        ("-" if d.p_value is None else f"{d.p_value:.2g}") + ("*" if sure else " "),
    ]


def format_metrics(metrics: Metrics) -> list[tuple[str, str, str, str]]:
    """Name, value, interval and baselines (if any) of every metric of one evaluation, as text."""
    intervals, known = metrics.get("intervals", {}), metrics.get("baselines", {})
    shown = []
    for name, value in metrics.items():
        if isinstance(value, int | float):
            text = f"{value:.4f}" if isinstance(value, float) else f"{value:,}"
            interval = intervals.get(name)
            between = "" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}"
            shown.append((name, text, between, baselines.describe(known.get(name, {}))))
    for field, gap in metrics.get("gaps", {}).items():
        if gap is None:
            shown.append((f"gap by {field}", "", "no two groups of 10 samples", ""))
        else:
            words = f"p = {gap['p_value']:.2g}, from {gap['worst']} to {gap['best']}"
            shown.append((f"gap by {field}", f"{gap['width']:.4f}", words, ""))
    return shown


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    """Columns of equal width, the first one flush left."""
    widths = [max(columns(line[i]) for line in lines) for i in range(len(lines[0]))]
    spaces = [[" " * (width - columns(cell)) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join(
        "  ".join([line[0] + space[0], *(gap + cell for gap, cell in zip(space[1:], line[1:], strict=True))])
        for line, space in zip(lines, spaces, strict=True)
    )
