"""Results as files and as text."""

import csv
import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mmssl.evaluate.classification import Classification
from mmssl.evaluate.compare import Difference, holm
from mmssl.evaluate.metrics import CalibrationBin, ClassRow, Confusion
from mmssl.evaluate.retrieval import Retrieval
from mmssl.evaluate.slices import Slice
from mmssl.types import Sample

Metrics = dict[str, Any]
"""One evaluation's figures by name."""

MAIN_METRICS = (
    "acc1",
    "acc5",
    "mean_per_class_recall",
    "mean_average_precision",
    "image_retrieval_recall@5",
    "text_retrieval_recall@5",
)
"""The figures of the short table, in its order."""
COUNTS = ("classes", "samples")


def write_json(path: Path, tree: Any) -> None:
    """Write JSON so that a reader sees the old file or the whole new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(tree, file, indent=2, ensure_ascii=False, allow_nan=False)
            file.write("\n")
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table as a file; None is an empty cell."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def write_per_class(path: Path, rows: Iterable[ClassRow]) -> None:
    """class, samples, recall, precision; a rate without a denominator is empty."""
    write_csv(
        path,
        ("class", "samples", "recall", "precision"),
        ((r.name, r.samples, r.recall, r.precision) for r in rows),
    )


def write_confusions(path: Path, confusions: Iterable[Confusion], classnames: Sequence[str]) -> None:
    """label, prediction, count of every wrong pair."""
    rows = ((classnames[c.label], classnames[c.prediction], c.count) for c in confusions)
    write_csv(path, ("label", "prediction", "count"), rows)


def write_predictions(path: Path, samples: Sequence[Sample], found: Classification) -> None:
    """One row a sample: shard, key, label, then the best classes and their scores, best first."""
    ranks = range(1, found.outcome.best.shape[1] + 1)
    header = ("shard", "key", "label", *(f"class{n}" for n in ranks), *(f"score{n}" for n in ranks))
    labels, best, scores = (t.tolist() for t in (found.labels, found.outcome.best, found.outcome.scores))
    names = found.classnames
    rows = (
        (sample.shard, sample.key, names[label], *(names[c] for c in classes), *values)
        for sample, label, classes, values in zip(samples, labels, best, scores, strict=True)
    )
    write_csv(path, header, rows)


def write_ranks(path: Path, samples: Sequence[Sample], found: Retrieval) -> None:
    """One row a picture and one a caption: the rank of the first right thing that it finds."""
    owner = found.image_of_caption.tolist()
    captions = zip(owner, found.captions, found.image_ranks.tolist(), strict=True)
    rows = [
        *((s.shard, s.key, "text", "", rank) for s, rank in zip(samples, found.text_ranks.tolist(), strict=True)),
        *((samples[image].shard, samples[image].key, "image", text, rank) for image, text, rank in captions),
    ]
    write_csv(path, ("shard", "key", "retrieval", "caption", "rank"), rows)


def write_calibration(path: Path, bins: Iterable[CalibrationBin]) -> None:
    """low, high, samples, confidence, accuracy: how often predictions of about one probability are right."""
    rows = ((b.low, b.high, b.samples, b.confidence, b.accuracy) for b in bins)
    write_csv(path, ("low", "high", "samples", "confidence", "accuracy"), rows)


def write_slices(path: Path, slices: Mapping[str, Sequence[Slice]]) -> None:
    """field, group, samples, accuracy and its interval of every slice."""
    rows = ((field, s.group, s.samples, s.accuracy, *s.interval) for field, rows in slices.items() for s in rows)
    write_csv(path, ("field", "group", "samples", "accuracy", "low", "high"), rows)


def write_average_precisions(path: Path, names: Sequence[str], positives: Sequence[int], precisions: Tensor) -> None:
    """class, positives, average precision (empty without positives)."""
    values = (None if math.isnan(p) else p for p in precisions.tolist())
    write_csv(path, ("class", "positives", "average_precision"), zip(names, positives, values, strict=True))


def format_results(results: Mapping[str, Metrics]) -> str:
    """A table for a terminal: one line an evaluation, the main figures in percent and the counts."""
    columns = [name for name in MAIN_METRICS if any(name in metrics for metrics in results.values())]
    header = ["", *columns, *COUNTS]
    lines = [
        [
            key,
            *(_percent(metrics.get(name)) for name in columns),
            *(str(metrics.get(name, "")) for name in COUNTS),
        ]
        for key, metrics in results.items()
    ]
    return _aligned([header, *lines])


def format_differences(differences: Mapping[str, Difference]) -> str:
    """A table for a terminal: both figures and their difference in percent; * marks those that are real (Holm, 5 %)."""
    real = holm([d.p_value for d in differences.values()])
    header = ["", "first", "second", "difference", "95 % interval", "p", ""]
    lines = [
        [
            name,
            *map(_percent, (d.first, d.second)),
            f"{100 * d.difference:+.2f}",
            f"{100 * d.interval[0]:+.2f} to {100 * d.interval[1]:+.2f}",
            f"{d.p_value:.2g}",
            "*" if sure else "",
        ]
        for (name, d), sure in zip(differences.items(), real, strict=True)
    ]
    return _aligned([header, *lines])


def format_figures(metrics: Metrics) -> list[tuple[str, str, str]]:
    """Every figure of one evaluation, its value, and its interval where it has one, in words."""
    intervals = metrics.get("intervals", {})
    shown = []
    for name, value in metrics.items():
        if isinstance(value, int | float):
            text = f"{value:.4f}" if isinstance(value, float) else f"{value:,}"
            interval = intervals.get(name)
            shown.append((name, text, "" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}"))
    for field, gap in metrics.get("gaps", {}).items():
        if gap is None:
            shown.append((f"gap by {field}", "", "no two groups of 10 samples"))
        else:
            words = f"p = {gap['p_value']:.2g}, from {gap['worst']} to {gap['best']}"
            shown.append((f"gap by {field}", f"{gap['width']:.4f}", words))
    return shown


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    """Columns of equal width, the first one flush left."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )
