"""Runs side by side."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mmssl.apps.report.run_reader import RunRecord
from mmssl.apps.report.wording import Metric, list_metrics, result_title
from mmssl.config import Config
from mmssl.errors import UserError
from mmssl.evaluate import compare
from mmssl.evaluate.tasks import direction

NO_DIRECTION = ("samples", "classes", "captions", "train_samples", "k", "c")


Row = list[tuple[Metric | None, bool]]
"""Value of each run, and a mark on the best."""


@dataclass(frozen=True)
class Change:
    """Change of a metric from the first run to another, on the same samples."""

    run: str
    metric: str
    difference: compare.Difference
    real: bool
    """Significant at 5 % over all metrics of the run (Holm)."""

    @property
    def text(self) -> str:
        """The difference in percentage points, with its interval."""
        low, high = self.difference.interval
        return f"{100 * self.difference.difference:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f})"


@dataclass(frozen=True)
class RunComparison:
    """Runs side by side."""

    metrics: list[tuple[str, list[tuple[str, Row]]]]
    """Evaluation -> its metrics, with the value of each run."""
    changes: list[Change]
    settings: list[tuple[str, list[str]]]
    """Settings that differ, and their values."""
    notes: list[str]


def compare_runs(runs: Sequence[RunRecord]) -> RunComparison:
    """All metrics, paired differences to the first run, and the settings that differ."""
    changes: list[Change] = []
    notes: list[str] = []
    for run in runs[1:]:
        try:
            found = compare.compare_results(runs[0].folder, run.folder)
        except UserError as error:
            notes.append(f"{run.name} cannot be compared sample by sample: {error}")
            continue
        real = compare.significant(found)
        changes += [Change(run.name, name, d, sure) for (name, d), sure in zip(found.items(), real, strict=True)]
    return RunComparison(list(_metrics(runs)), changes, _settings(runs), notes)


def _metrics(runs: Sequence[RunRecord]) -> Iterator[tuple[str, list[tuple[str, Row]]]]:
    for key in dict.fromkeys(key for run in runs for key in run.results):
        of_runs = [{metric.name: metric for metric in list_metrics(run.results.get(key, {}))} for run in runs]
        rows = []
        for name in dict.fromkeys(name for metrics in of_runs for name in metrics):
            row = [metrics.get(name) for metrics in of_runs]
            words = next(metric.words for metric in row if metric is not None)
            rows.append((words, list(zip(row, _best(name, row), strict=True))))
        yield result_title(key), rows


def _best(name: str, row: Sequence[Metric | None]) -> list[bool]:
    """The best run of a row, if there is one and not all are equal."""
    last = name.rsplit(" / ", 1)[-1]
    values = [metric.value for metric in row if metric is not None]
    if last in NO_DIRECTION or len(set(values)) < 2:
        return [False] * len(row)
    best = max(values, key=lambda value: direction(last) * value)
    return [metric is not None and metric.value == best for metric in row]


def _settings(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    flat = [_flat(run.config) for run in runs]
    keys = sorted({key for of_run in flat for key in of_run if key != "run_dir"})
    rows = [(key, [str(of_run.get(key, "not set")) for of_run in flat]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _flat(config: Config | None) -> dict[str, Any]:
    """`section.key` -> value."""
    if config is None:
        return {}

    def walk(tree: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        if isinstance(tree, dict) and tree:
            for key, value in tree.items():
                yield from walk(value, f"{prefix}{key}.")
        else:
            yield prefix.rstrip("."), tree

    return dict(walk(config.model_dump(mode="json"), ""))
