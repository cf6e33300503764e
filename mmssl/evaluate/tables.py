"""Results as files and as text."""

import csv
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmssl.evaluate.metrics import ClassRow, Confusion
from mmssl.evaluate.zero_shot import ZeroShot
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


def write_per_class(path: Path, rows: Iterable[ClassRow]) -> None:
    """class, samples, recall, precision; a rate without a denominator is empty."""
    _write_csv(
        path,
        ("class", "samples", "recall", "precision"),
        ((r.name, r.samples, r.recall, r.precision) for r in rows),
    )


def write_confusions(path: Path, confusions: Iterable[Confusion], classnames: Sequence[str]) -> None:
    """label, prediction, count of every wrong pair."""
    rows = ((classnames[c.label], classnames[c.prediction], c.count) for c in confusions)
    _write_csv(path, ("label", "prediction", "count"), rows)


def write_predictions(path: Path, samples: Sequence[Sample], result: ZeroShot) -> None:
    """One row a sample: shard, key, label, and the best classes with their similarities."""
    k = result.best.shape[1]
    header = (
        "shard",
        "key",
        "label",
        *(f"{word}{n}" for n in range(1, k + 1) for word in ("class", "similarity")),
    )
    rows = (
        (
            sample.shard,
            sample.key,
            result.classnames[label],
            *(v for c, s in zip(best, sims, strict=True) for v in (result.classnames[c], s)),
        )
        for sample, label, best, sims in zip(
            samples, result.labels.tolist(), result.best.tolist(), result.similarity.tolist(), strict=True
        )
    )
    _write_csv(path, header, rows)


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
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            [
                line[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
            ]
        )
        for line in [header, *lines]
    )


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
