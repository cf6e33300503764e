"""Metrics and facts in plain words, shared by the page and the model card."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from safetensors import safe_open

from mmssl.apps.report.run_reader import RunRecord
from mmssl.evaluate import Metrics
from mmssl.evaluate.tasks import main_metrics, task_label

WORDS = {
    "acc1": "Accuracy",
    "acc5": "Right class among the first five",
    "mean_per_class_recall": "Accuracy, mean over classes",
    "mean_average_precision": "Mean average precision",
    "calibration_error": "Calibration error",
    "samples": "Images",
    "captions": "Captions",
    "classes": "Classes",
    "bad_samples": "Images that could not be used",
    "train_samples": "Training images",
    "real_gaps": "Significant gaps between groups",
    "caption_accuracy": "The right caption among hard ones",
    "text_score": "Both images find their caption",
    "image_score": "Both captions find their image",
    "group_score": "Both images and both captions are right",
    "recall@1": "The nearest image has the same class",
    "map@r": "Images of the class come first, mean precision",
    "v_measure": "Agreement of clusters and classes (V-measure)",
    "adjusted_rand": "Agreement of clusters and classes beyond chance (adjusted Rand index)",
    "auroc_prompts": "Unknown classes told by prompts (AUROC)",
    "auroc_images": "Unknown classes told by the nearest images (AUROC)",
    "fpr95_prompts": "Unknown images that pass with 95 % of the known ones, by prompts",
    "fpr95_images": "Unknown images that pass with 95 % of the known ones, by the nearest images",
}
RATES = re.compile(r"acc\d|recall|precision|map@|calibration_error|accuracy|_score|fpr95")

LONGEST = 200
"""Largest number of characters shown of a name or caption."""


@dataclass(frozen=True)
class Metric:
    """One measured number."""

    name: str
    words: str
    value: float
    interval: tuple[float, float] | None
    rate: bool
    """A fraction, shown in percent."""
    baselines: tuple[tuple[str, float], ...] = ()
    """Name and value of answers without the image: the most frequent class, and chance."""

    @property
    def text(self) -> str:
        """The value with its unit."""
        return in_words(self.value, self.rate)

    @property
    def interval_text(self) -> str:
        """The 95 % interval; empty without one."""
        if self.interval is None:
            return ""
        return f"{in_words(self.interval[0], self.rate)} to {in_words(self.interval[1], self.rate)}"

    @property
    def baseline_text(self) -> str:
        """The values of answers without the image; empty if there are none."""
        return ", ".join(f"{name} {in_words(value, self.rate)}" for name, value in self.baselines)


def in_words(value: float, rate: bool) -> str:
    """A number as text."""
    if not math.isfinite(value):
        return "none"
    if rate:
        return f"{100 * value:.1f} %"
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.4g}"


def brief(text: str) -> str:
    """A name or caption, cut if it is too long."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def list_metrics(metrics: Metrics) -> list[Metric]:
    """Every metric of an evaluation; metrics inside others are named `outer / inner`."""
    return list(_metrics(metrics, metrics.get("intervals") or {}, ""))


def _metrics(tree: Metrics, intervals: Any, prefix: str) -> Iterator[Metric]:
    for name, value in tree.items():
        if name in ("intervals", "gaps", "baselines"):
            continue
        if isinstance(value, dict):
            inner = value.get("intervals") or (intervals.get(name) if isinstance(intervals, dict) else None) or {}
            yield from _metrics(value, inner, f"{prefix}{name} / ")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found = intervals.get(name) if isinstance(intervals, dict) else None
            pair = (float(found[0]), float(found[1])) if isinstance(found, list | tuple) and len(found) == 2 else None
            rate = RATES.search(name) is not None and 0 <= value <= 1
            label = f"{prefix}{metric_label(name)}"
            yield Metric(f"{prefix}{name}", label, float(value), pair, rate, _baselines(tree, name))


def _baselines(tree: Metrics, name: str) -> tuple[tuple[str, float], ...]:
    known = tree.get("baselines")
    found = known.get(name) if isinstance(known, dict) else None
    pairs = found.items() if isinstance(found, dict) else ()
    return tuple((str(kind), float(value)) for kind, value in pairs if isinstance(value, int | float))


def metric_label(name: str) -> str:
    """Name of a metric in plain words."""
    if name in WORDS:
        return WORDS[name]
    if name.startswith("acc1_"):
        return f"Accuracy: {name.removeprefix('acc1_').replace('_', ' ')}"
    found = re.fullmatch(r"(image|text)_retrieval_(recall|map)@(\d+)", name)
    if found is not None:
        search = "A caption finds its image" if found[1] == "image" else "An image finds its caption"
        return f"{search}, {'among the first' if found[2] == 'recall' else 'mean precision of the first'} {found[3]}"
    if name.endswith("_retrieval_median_rank"):
        return f"Median place of the right {'image' if name.startswith('image') else 'caption'}"
    return name.replace("_", " ")


def result_title(key: str) -> str:
    """`DATASET/TASK` in plain words."""
    name, _, task = key.rpartition("/")
    return f"{name}: {task_label(task)}" if name else key


def main_metric(key: str, metrics: Metrics) -> Metric | None:
    """The metric that sums up the evaluation of `DATASET/TASK`."""
    by_name = {metric.name: metric for metric in list_metrics(metrics)}
    return next(
        (by_name[name] for name in main_metrics(key.rpartition("/")[2]) if name in by_name),
        next(iter(by_name.values()), None),
    )


def chance(metrics: Metrics) -> float | None:
    """The accuracy of guessing, for classifications: at the class frequencies, where they were measured."""
    known = _baselines(metrics, "acc1")
    if known:
        return dict(known).get("chance")
    classes = metrics.get("classes")
    return 1 / classes if "acc1" in metrics and isinstance(classes, int) and classes > 0 else None


def summary(run: RunRecord) -> str:
    """The run in two or three sentences."""
    sentences = [f"{run.name}: {run.state}."]
    if run.last:
        pairs, seconds = run.last.get("samples"), run.last.get("seconds")
        seen = f", {pairs:,} pairs seen" if isinstance(pairs, int) else ""
        took = f", {duration(seconds)} of training" if isinstance(seconds, int | float) else ""
        sentences.append(f"{run.last['step']:,} steps{seen}{took}.")
    sentences.extend(_best_step(run))
    for key, metrics in run.results.items():
        metric, guess = main_metric(key, metrics), chance(metrics)
        if metric is not None:
            sure = f" ({metric.interval_text})" if metric.interval is not None else ""
            times = f", {metric.value / guess:.0f} times chance" if guess and metric.name == "acc1" else ""
            sentences.append(f"{result_title(key)}: {metric.words.lower()} {metric.text}{sure}{times}.")
    return " ".join(sentences)


def _best_step(run: RunRecord) -> list[str]:
    """A sentence about weights that are not those of the last step."""
    try:
        found = run.best or {}
        best, last = (found[name] for name in ("best", "last"))
        if run.model is None or found["exported_step"] == last["step"]:
            return []
        why = "ended early" if found["ended_early"] else "reached its end"
        return [
            f"The weights are those of step {found['exported_step']:,}, the best by {found['metric']}: "
            f"{best['value']:.4g}; the run {why} with {last['value']:.4g} at step {last['step']:,}."
        ]
    except (KeyError, TypeError, ValueError):
        return [f"{run.folder / 'best.json'} is damaged, so the step of the weights is unknown."]


def duration(seconds: float) -> str:
    """Seconds in readable units."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def data_sources(run: RunRecord) -> list[str]:
    """The training data of a run, as configured."""
    if run.config is None:
        return []
    train = run.config.data.train
    entries = [train] if isinstance(train, str) else train
    return [str(entry if isinstance(entry, str) else f"{entry.shards} (weight {entry.weight:g})") for entry in entries]


def parameters(run: RunRecord) -> int | None:
    """Weights of the model, counted in its file's header."""
    path = run.model / "model.safetensors" if run.model is not None else None
    if path is None or not path.is_file():
        return None
    total = 0
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            total += math.prod(file.get_slice(name).get_shape())
    return total
