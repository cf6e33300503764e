"""The report page: one HTML file about one or several runs."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from mmssl.apps.explain import DEFAULT
from mmssl.apps.report import wording as facts
from mmssl.apps.report.comparison import compare_runs
from mmssl.apps.report.curves import build_curves
from mmssl.apps.report.gallery import Gallery, add_maps, read_gallery
from mmssl.apps.report.render import render_page
from mmssl.apps.report.run_reader import RunRecord, collect, read_table
from mmssl.apps.report.wording import Metric, list_metrics
from mmssl.errors import UserError
from mmssl.evaluate import Metrics
from mmssl.files import sha256
from mmssl.inference import Model, load

LARGEST = 10_000_000
"""Page size that every browser opens quickly, in bytes."""
MATRIX_CLASSES = 30
LISTED = 10
ENOUGH = 5
"""Least number of samples of a class for its accuracy to be listed."""
ILLUSTRATED_TASKS = ("zero_shot", "retrieval")


@dataclass(frozen=True)
class Evaluation:
    """One task on one dataset, as shown on the page."""

    id: str
    title: str
    metrics: list[Metric]
    chance: float | None
    gaps: dict[str, Any]
    note: str | None
    """Limits of the conclusions from this evaluation."""
    slices: list[dict[str, str]]
    """Accuracy by group, with samples and interval."""
    confusions: list[dict[str, str]]
    matrix: tuple[list[str], list[list[int]]] | None
    """Class names, and counts by row = label, column = prediction."""
    classes: list[dict[str, str]]
    """The classes with the lowest recall, among those with enough samples."""
    calibration: list[dict[str, float]]
    """Bins of probability, with the share of right predictions."""
    gallery: Gallery | None


@dataclass(frozen=True)
class RunView:
    """A run as shown on the page."""

    id: str
    run: RunRecord
    summary: str
    tiles: list[tuple[str, str, str]]
    """Value, label and remark."""
    evaluations: list[Evaluation]
    repeat: list[tuple[str, str]]
    """Commands, versions and hashes to repeat the run."""
    health: list[tuple[str, list[tuple[str, str]]]]
    """Statistics of the training data by subject."""


def write_report(
    folders: Sequence[Path],
    out: Path,
    *,
    images: int = 1000,
    method: str | None = None,
    device: str = "cpu",
    progress: Callable[[str], None] | None = None,
) -> tuple[Path, list[str]]:
    """Write OUT/index.html about runs.

    Args:
        folders: run folders, finished or not.
        images: images to encode per dataset; 0: none.
        method: method for the maps of the examples, a name in `mmssl.apps.explain.METHODS`.
        progress: called with a description of the current work.
    Returns:
        The file, and notes on unreadable files.
    Raises:
        UserError: a folder is not a run, a model cannot be loaded, or the page cannot be written.
    """
    runs = collect(folders)
    views = []
    for number, run in enumerate(runs):
        wanted = run.model is not None and images > 0 and len(run.results) > 0
        model = load(run.model).to(device) if wanted and run.model is not None else None
        look = partial(_gallery, run, model, images, method or DEFAULT, progress)
        views.append(_view(run, f"run{number}", look))
    page = render_page(
        title=f"Report: {', '.join(run.name for run in runs)}",
        views=views,
        curves=build_curves(runs),
        comparison=compare_runs(runs) if len(runs) > 1 else None,
    ).encode()
    notes = [note for run in runs for note in run.notes]
    if len(page) > LARGEST:
        notes.append(f"the page has {len(page) / 1e6:.1f} MB; give fewer runs, or a smaller --images")
    path = out / "index.html"
    try:
        out.mkdir(parents=True, exist_ok=True)
        path.write_bytes(page)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; give another folder") from None
    return path, notes


def _gallery(
    run: RunRecord, model: Model | None, images: int, method: str, progress: Callable[[str], None] | None, key: str
) -> Gallery | None:
    if not key.endswith(ILLUSTRATED_TASKS):
        return None
    gallery = read_gallery(run.tables[key])
    if model is None:
        why = "Images were not encoded for this page." if images == 0 else "The run has no model yet."
        return replace(gallery, notes=[*gallery.notes, why])
    if progress is not None:
        progress(f"{run.name}: {key}")
    return add_maps(gallery, run, key, model, images, method)


def _view(run: RunRecord, name: str, look: Callable[[str], Gallery | None]) -> RunView:
    evaluations = []
    for place, (key, metrics) in enumerate(run.results.items()):
        tables = run.tables[key]
        evaluations.append(
            Evaluation(
                id=f"{name}-{place}",
                title=facts.result_title(key),
                metrics=list_metrics(metrics),
                chance=facts.chance(metrics),
                gaps=slice_gaps(metrics),
                note=metrics.get("note"),
                slices=brief_rows(read_table(tables / "slices.csv")),
                confusions=brief_rows(r for r in read_table(tables / "confusions.csv")[:LISTED] if int(r["count"]) > 1),
                matrix=confusion_table(read_table(tables / "predictions.csv")),
                classes=brief_rows(hardest(read_table(tables / "per_class.csv"))),
                calibration=[
                    {name: float(cell) for name, cell in row.items()} for row in read_table(tables / "calibration.csv")
                ],
                gallery=look(key),
            )
        )
    return RunView(name, run, facts.summary(run), tiles(run), evaluations, repeat(run), health(run))


def confusion_table(predictions: Sequence[Mapping[str, str]]) -> tuple[list[str], list[list[int]]] | None:
    """Class names and counts (row = label, column = prediction); None without predictions or with too many classes."""
    pairs = Counter((row["label"], row["class1"]) for row in predictions if "class1" in row)
    names = sorted({name for pair in pairs for name in pair})
    if not 1 < len(names) <= MATRIX_CLASSES:
        return None
    return [facts.brief(name) for name in names], [[pairs[label, guess] for guess in names] for label in names]


def slice_gaps(metrics: Metrics) -> dict[str, Any]:
    """The widest gap per field, if at least two groups are large enough."""
    found = {facts.brief(field): gap for field, gap in (metrics.get("gaps") or {}).items() if gap is not None}
    return {field: {**gap, **{end: facts.brief(gap[end]) for end in ("best", "worst")}} for field, gap in found.items()}


def brief_rows(rows: Iterable[Mapping[str, str]]) -> list[dict[str, str]]:
    """The rows of a table, with long entries cut."""
    return [{name: facts.brief(cell) for name, cell in row.items()} for row in rows]


def hardest(rows: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """The classes with the lowest recall, among those with enough samples."""
    enough = [dict(row) for row in rows if int(row["samples"]) >= ENOUGH and row["recall"] != ""]
    return sorted(enough, key=lambda row: float(row["recall"]))[:LISTED]


def tiles(run: RunRecord) -> list[tuple[str, str, str]]:
    """The run in a few large numbers."""
    found = []
    for key, metrics in run.results.items():
        metric, guess = facts.main_metric(key, metrics), facts.chance(metrics)
        if metric is not None and metric.rate and key.endswith(ILLUSTRATED_TASKS):
            parts = [f"95 %: {metric.interval_text}" if metric.interval is not None else ""]
            parts.append(f"chance {100 * guess:.2g} %" if guess is not None else "")
            found.append((metric.text, facts.result_title(key), "; ".join(part for part in parts if part)))
    last = run.last
    if isinstance(last.get("seconds"), int | float):
        found.append((facts.duration(last["seconds"]), "training time", f"{last['step']:,} steps"))
    if isinstance(last.get("samples"), int):
        speeds = sorted(row["samples_per_s"] for row in run.metrics if isinstance(row.get("samples_per_s"), float))
        middle = f"{speeds[len(speeds) // 2]:,.0f} per second" if speeds else ""
        found.append((f"{last['samples']:,}", "pairs seen", middle))
    if (count := facts.parameters(run)) is not None:
        found.append((f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count:,}", "weights in the model", ""))
    return found


def repeat(run: RunRecord) -> list[tuple[str, str]]:
    """Commands, versions and hashes."""
    rows = [("Trained on", source) for source in facts.data_sources(run)]
    for start in run.starts:
        begun = "Started" if start.get("step", 0) == 0 else f"Resumed at step {start.get('step')}"
        rows += [(f"{begun}, {start.get('time', '')}", str(start.get("command", "")))]
    if run.starts:
        last = run.starts[-1]
        code = last.get("code") or {}
        changed = ", with changes that are not committed" if code.get("changed") else ""
        rows += [("Commit of mmssl", f"{code['commit']}{changed}")] if code.get("commit") else []
        rows += [("Processes", str(last.get("processes", ""))), ("Machine", str(last.get("platform", "")))]
        rows += [("Fingerprint of the training shards", str(last.get("data_fingerprint", "")))]
        rows += [("Versions", ", ".join(f"{name} {number}" for name, number in last.get("versions", {}).items()))]
    else:
        rows.append(("Command", f"mmssl train {run.folder / 'config.yaml'} run_dir=ANOTHER_FOLDER"))
    if run.model is not None and (run.model / "model.safetensors").is_file():
        rows.append(("SHA-256 of model.safetensors", sha256(run.model / "model.safetensors")))
    return [*rows, ("This page", f"mmssl report {run.folder}")]


def health(run: RunRecord) -> list[tuple[str, list[tuple[str, str]]]]:
    """Statistics and problems of the training data, by subject."""
    found = []
    if "bad_samples" in run.last:
        rows = [("Samples that could not be used", str(run.last["bad_samples"]))]
        rows += [(f"{bad.get('shard')}:{bad.get('key')}", str(bad.get("error"))) for bad in run.bad_samples[:LISTED]]
        rows.append(("Remote reads that were retried", str(run.last.get("retries", 0))))
        found.append(("During training", rows))
    advice = (run.health or {}).get("advice", [])
    if advice:
        found.append(("What to fix", [(str(n), str(line)) for n, line in enumerate(advice, start=1)]))
    for subject, statistics in (run.health or {}).items():
        if isinstance(statistics, dict):
            rows = [(str(name), in_short(value)) for name, value in statistics.items() if value not in ([], {}, None)]
            found.append((subject.capitalize(), rows))
    return found


def in_short(value: Any) -> str:
    """A value of data_health.json as one line."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{name}: {in_short(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(in_short, value))
    return str(value)
