"""The health of a data set: what is wrong with its samples, and what to do about it."""

import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mmssl.data.health import statistics as measure
from mmssl.data.health.duplicates import connect, near_duplicates, same, words_of
from mmssl.data.health.statistics import Figures
from mmssl.data.health.survey import Survey
from mmssl.data.transforms import Tokenizer


@dataclass(frozen=True)
class HealthReport:
    """Figures about a data set by subject, and advice."""

    samples: Figures
    images: Figures
    captions: Figures
    batches: Figures
    advice: tuple[str, ...]
    """What to fix, the gravest first; empty when all is well."""

    def figures(self) -> dict[str, Figures]:
        """The figures by subject."""
        return {name: getattr(self, name) for name in ("samples", "images", "captions", "batches")}

    def text(self) -> str:
        """The whole report for a terminal, ending with what to fix."""
        lines = []
        for subject, figures in self.figures().items():
            lines.append(subject)
            lines += [f"  {name:<42} {_show(value)}" for name, value in figures.items() if value not in ([], {})]
        lines += ["", "what to fix" if self.advice else "nothing to fix"]
        return "\n".join([*lines, *(f"  {number}. {line}" for number, line in enumerate(self.advice, start=1))])

    def json(self) -> str:
        """Figures and advice as JSON."""
        return json.dumps({**self.figures(), "advice": self.advice}, indent=1, ensure_ascii=False)


def check(
    survey: Survey, *, tokenizer: Tokenizer | None = None, image_size: int = 224, batch_size: int = 256
) -> HealthReport:
    """Judge a surveyed data set for training at an image size and batch size.

    Captions are measured in tokens of `tokenizer`, in words without one.
    """
    copies = same(survey.digests)
    near = near_duplicates(np.array(survey.thumbnails))
    alike = same([words_of(caption) for caption in survey.captions])
    groups = connect(len(survey), copies, near, alike)
    health = HealthReport(
        samples=measure.sample_statistics(survey),
        images=measure.image_statistics(survey, image_size) | measure.image_copy_statistics(survey, copies, near),
        captions=measure.caption_statistics(survey, tokenizer) | measure.caption_copy_statistics(survey, alike),
        batches={"batch size": batch_size} | measure.batch_statistics(len(survey), groups, batch_size),
        advice=(),
    )
    return replace(health, advice=tuple(_advice(health, image_size)))


def draw(survey: Survey, health: HealthReport, path: Path, tokenizer: Tokenizer | None = None) -> None:
    """Write a PNG with the distributions of sizes, shapes, caption lengths, repetition, scripts and losses."""
    figure = Figure(figsize=(14, 8), layout="constrained")
    axes: list[Axes] = list(figure.subplots(2, 3).flat)
    sides = survey.sides()
    _histogram(axes[0], sides.min(1), "shorter side, pixels", log=True)
    _histogram(axes[1], sides[:, 0] / sides[:, 1], "width / height", log=True)
    unit = "words" if tokenizer is None else "tokens"
    _histogram(axes[2], measure.length_statistics(survey, tokenizer), f"caption length, {unit}")
    _bars(axes[3], health.captions["most repeated"], "most repeated captions")
    _bars(axes[4], health.captions["scripts of letters"], "scripts, share of letters")
    _bars(axes[5], health.samples["left out"], "samples left out, by reason")
    with warnings.catch_warnings():
        # Captions in scripts that the font lacks are drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(path, dpi=110)


def _advice(health: HealthReport, image_size: int) -> Iterator[str]:
    samples, captions, count = health.samples, health.captions, health.samples["usable"]
    if lost := sum(samples["left out"].values()):
        yield f"{lost} samples are left out, for the reasons above: mend or remove them"
    if count == 0:
        yield "no sample is usable: a sample is NAME.jpg with NAME.txt or NAME.json beside it in the tar"
        return
    if damaged := samples["damaged shards"]:
        yield f"{len(damaged)} shards are damaged, as said above: fetch or pack them again"
    if samples["keys in several shards"]:
        yield "the same keys stand in several shards: one of these may be a copy of the other"
    yield from _image_advice(health.images, count, image_size)
    meets, size = health.batches.get("samples that meet a copy", 0.0), health.batches["batch size"]
    if meets > 0.1:
        yield (
            f"{meets:.0%} of the samples meet a copy of their image or caption in a batch of {size} and are pushed "
            "away from it: vary the captions, or use a smaller batch"
        )
    if captions.get("cut", 0.0) > 0.05:
        yield f"{captions['cut']:.0%} of the captions are cut: raise model.text.max_tokens"
    if (bare := captions["no masked word at a rate of 0.15"]) > 0.2:
        yield (
            f"{bare:.0%} of the captions would get no masked word at BERT's rate of 0.15: raise the rate of masked "
            "language modelling to 0.3 or 0.4"
        )


def _image_advice(images: Figures, count: int, image_size: int) -> Iterator[str]:
    if again := images["exact copies under another caption"]:
        yield (
            f"{again} images come again under another caption: merge the captions into a list in one sample's JSON "
            "and name the list in data.captions"
        )
    if (copies := images["exact copies"] + images["near copies"]) > 0.02 * count:
        yield f"{copies / count:.1%} of the images are copies of others: keep one of each"
    if (tiny := images["tiny"]) > 0.01:
        yield f"{tiny:.1%} of the images are below {measure.TINY} px: remove them"
    if images["huge"] > 0 or images["shrunk to a quarter or less"] > 0.5:
        yield (
            f"images are far larger than the {image_size} px a model sees: shrink them once, with "
            f"`mmssl shards pack --resize {2 * image_size}`, to save most of the decoding"
        )
    if (long := images["long"]) > 0.05:
        yield f"{long:.0%} of the images are over {measure.LONG} times as long as wide: a crop shows little of them"


def _show(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_show(count)}" for name, count in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        nested = any(isinstance(item, list) for item in value)
        return ("\n" + " " * 45 if nested else ", ").join(map(_show, value))
    return str(value)


def _histogram(axes: Axes, values: npt.NDArray[Any], title: str, log: bool = False) -> None:
    axes.set_title(title)
    if len(values) == 0:
        axes.set_axis_off()
        return
    low, high = float(values.min()), float(values.max())
    log = log and high > 2 * low
    edges = np.geomspace(low, high, 40) if log else np.linspace(low, high + 1e-9, 40)
    axes.hist(values, bins=edges.tolist(), color="#4c72b0")
    axes.set_xscale("log" if log else "linear")
    axes.set_ylabel("samples")


def _bars(axes: Axes, values: dict[str, float], title: str) -> None:
    axes.set_title(title)
    if not values:
        axes.text(0.5, 0.5, "none", ha="center", va="center")
        axes.set_axis_off()
        return
    names = [name if len(name) <= 32 else name[:31] + "…" for name in values]
    rows = range(len(names))
    axes.barh(list(rows), list(values.values()), color="#dd8452")
    axes.set_yticks(list(rows), names, fontsize=8, parse_math=False)
    axes.invert_yaxis()
