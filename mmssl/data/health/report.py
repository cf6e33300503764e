"""Health report of a dataset: problems of its samples, and advice."""

import json
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mmssl.data.health import statistics
from mmssl.data.health.duplicates import KnownImages, connect, equal_pairs, near_duplicates, sorted_words
from mmssl.data.health.statistics import Statistics
from mmssl.data.health.survey import Survey
from mmssl.data.shards.account import DAMAGED, Account
from mmssl.data.shards.causes import account_of
from mmssl.data.transforms import Tokenizer
from mmssl.plotting import BLUE, ORANGE, drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes


_PAIRS = "expected pairs of copies"
"""The statistic with a fraction that is no share."""


@dataclass(frozen=True)
class HealthReport:
    """Statistics of a dataset by subject, and advice."""

    samples: Statistics
    images: Statistics
    captions: Statistics
    batches: Statistics
    advice: tuple[str, ...]
    """What to fix, most serious first. Empty: nothing."""
    account: Account
    """The samples that are used and left out, by cause."""
    against: Statistics = field(default_factory=dict)
    """Images that are copies of those in other shards. Empty: none were given."""

    def statistics(self) -> dict[str, Statistics]:
        """All statistics by subject."""
        names = ("samples", "images", "captions", "batches", *(["against"] if self.against else []))
        return {name: getattr(self, name) for name in names}

    def text(self, width: int | None = None) -> str:
        """The report as text, ending with the advice and the account of the samples.

        Args:
            width: columns of the terminal, in which long lines are broken between words. None: lines stay whole.
        """
        lines: list[tuple[str, int]] = []  # with the column in which a broken line goes on
        for subject, values in self.statistics().items():
            lines.append((subject, 0))
            shown = {name: _show(value, name != _PAIRS) for name, value in values.items() if value not in ([], {})}
            lines += [(f"  {name:<42} {value}", 45) for name, value in shown.items()]
        lines += [("", 0), ("what to fix" if self.advice else "nothing to fix", 0)]
        lines += [(f"  {number}. {line}", 5) for number, line in enumerate(self.advice, start=1)]
        lines += [("", 0), *((line, 2) for line in self.account.text().splitlines())]
        return "\n".join(part for line, column in lines for part in _broken(line, width, column))

    def json(self) -> str:
        """Statistics and advice as JSON."""
        return json.dumps({**self.statistics(), "advice": self.advice}, indent=1, ensure_ascii=False)


def _broken(text: str, width: int | None, column: int) -> Iterator[str]:
    for line in text.split("\n"):
        if width is None or len(line) <= width:
            yield line
        else:
            # Paths stay whole, to be copied.
            indent = " " * column
            yield from textwrap.wrap(
                line, width, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
            )


def check_health(
    survey: Survey,
    *,
    tokenizer: Tokenizer | None = None,
    image_size: int = 224,
    batch_size: int = 256,
    against: KnownImages | None = None,
) -> HealthReport:
    """Assess a surveyed dataset for training at an image size and batch size.

    Caption lengths are in tokens of `tokenizer`, or in words without one. `against`: images of another split, of which
    this one should hold no copies.
    """
    copies = equal_pairs(survey.digests)
    near = near_duplicates(np.array(survey.thumbnails))
    alike = equal_pairs([sorted_words(caption) for caption in survey.captions])
    groups = connect(len(survey), copies, near, alike)
    health = HealthReport(
        samples=statistics.sample_statistics(survey),
        images=statistics.image_statistics(survey, image_size) | statistics.image_copy_statistics(survey, copies, near),
        captions=statistics.caption_statistics(survey, tokenizer) | statistics.caption_copy_statistics(survey, alike),
        batches={"batch size": batch_size}
        | statistics.batch_statistics(len(survey), groups, batch_size)
        | statistics.caption_batch_statistics(survey, batch_size),
        advice=(),
        account=_account(survey),
        against={} if against is None else statistics.shared_statistics(survey, against),
    )
    return replace(health, advice=tuple(_advice(health, image_size)))


def _account(survey: Survey) -> Account:
    """The samples, and the damaged shards."""
    account = account_of(len(survey), survey.bad)
    for problem in survey.problems:
        account.leave_out(DAMAGED, problem)  # which says what to do
    return account


def draw_report(survey: Survey, health: HealthReport, path: Path, tokenizer: Tokenizer | None = None) -> None:
    """Write a PNG with the distributions of sizes, shapes, caption lengths, repetitions, scripts and errors."""
    sides = survey.sides()
    unit = "words" if tokenizer is None else "tokens"
    with drawing(path, 14, 8) as canvas:
        axes: list[Axes] = list(canvas.subplots(2, 3).flat)
        _histogram(axes[0], sides.min(1), "shorter side, pixels", log=True)
        _histogram(axes[1], sides[:, 0] / sides[:, 1], "width / height", log=True)
        _histogram(axes[2], statistics.length_statistics(survey, tokenizer), f"caption length, {unit}")
        _bars(axes[3], health.captions["most repeated"], "most repeated captions")
        _bars(axes[4], health.captions["scripts of letters"], "scripts, fraction of letters")
        _bars(axes[5], health.samples["left out"], "samples left out, by reason")


def _advice(health: HealthReport, image_size: int) -> Iterator[str]:
    samples, captions, count = health.samples, health.captions, health.samples["usable"]
    if lost := sum(samples["left out"].values()):
        yield f"samples left out: {lost}; see the causes and remedies below"
    if damaged := samples["damaged shards"]:
        yield f"damaged shards: {len(damaged)}, listed above; download or pack them again"
    if count == 0:
        yield "no sample is usable: a sample is KEY.jpg with KEY.txt or KEY.json next to it in the tar"
        return
    if samples["keys in several shards"]:
        yield "the same keys occur in several shards: one of these may be a copy of another"
    if shared := health.against.get("exact copies", 0) + health.against.get("near copies", 0):
        yield (
            f"{shared} images are copies of images in the shards of --against, so that metrics on one of them are too "
            "high: pack again with `mmssl shards pack SOURCE --out OUT --without-copies-of SHARDS`"
        )
    yield from _image_advice(health.images, count, image_size)
    meets, size = health.batches.get("samples that meet a copy", 0.0), health.batches["batch size"]
    if (by_caption := health.batches.get("samples that meet their caption", 0.0)) > 0.1:
        yield (
            f"{by_caption:.0%} of the samples meet another sample with their caption in a batch of {size}, as a false "
            "negative: train with objectives.contrastive.positives=caption, so that these are positives too (or, with "
            "objectives.contrastive.same=mask beside it, neither)"
        )
    if meets > by_caption + 0.1:
        yield (
            f"{meets:.0%} of the samples meet a copy of their image, or their caption's words, in a batch of {size}: "
            "keep one of each, vary the captions, use a smaller batch, or train with "
            "objectives.contrastive.positives=FIELD if a field of the .json tells which samples belong together"
        )
    yield from _token_advice(captions)
    if (bare := captions["no masked word at a rate of 0.15"]) > 0.2:
        yield (
            f"{bare:.0%} of the captions would get no masked word at BERT's rate of 0.15: raise the rate of masked "
            "language modelling to 0.3 or 0.4"
        )


def _token_advice(captions: Statistics) -> Iterator[str]:
    if captions.get("cut", 0.0) > 0.05:
        yield f"{captions['cut']:.0%} of the captions are cut: raise model.text.max_tokens"
    if (unknown := captions.get("unknown tokens", 0.0)) > 0.001:
        yield (
            f"{unknown:.1%} of the tokens are unknown, in {captions['captions with unknown tokens']:.1%} of captions: "
            f"use a tokenizer that knows {_show(captions['unknown, examples'])}, such as model.text.tokenizer=train"
        )
    if same := captions.get("different captions with the same tokens", 0):
        yield (
            f"{same} captions have the same tokens as a different caption: this tokenizer drops marks or letters; "
            "model.text.tokenizer=train keeps all"
        )


def _image_advice(images: Statistics, count: int, image_size: int) -> Iterator[str]:
    if again := images["exact copies under another caption"]:
        yield (
            f"{again} images occur again under another caption: merge the captions into a list in one sample's JSON "
            "and name the list in data.captions: each epoch draws one of them"
        )
    if (copies := images["exact copies"] + images["near copies"]) > 0.02 * count:
        yield f"{copies / count:.1%} of the images are copies of others: keep one of each"
    if (tiny := images["tiny"]) > 0.01:
        yield f"{tiny:.1%} of the images are below {statistics.TINY} px: remove them"
    if images["huge"] > 0 or images["shrunk to a quarter or less"] > 0.5:
        yield (
            f"images are far larger than the {image_size} px a model sees: shrink them once, with "
            f"`mmssl shards pack --resize {2 * image_size}`, to save most of the decoding"
        )
    if (long := images["long"]) > 0.05:
        yield f"{long:.0%} of the images are over {statistics.LONG} times as long as wide: a crop shows little of them"


def _show(value: Any, is_share: bool = False) -> str:
    """A statistic as text. `is_share`: a number with a fraction is a share."""
    if isinstance(value, float):
        return f"{100 * value:.3g}%" if is_share else f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_show(count, is_share)}" for name, count in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        nested = any(isinstance(item, list) for item in value)
        return ("\n" + " " * 45 if nested else ", ").join(map(_show, value))
    return str(value)


def _histogram(axes: "Axes", values: npt.NDArray[Any], title: str, log: bool = False) -> None:
    axes.set_title(title)
    if len(values) == 0:
        axes.set_axis_off()
        return
    low, high = float(values.min()), float(values.max())
    log = log and high > 2 * low
    # Equal values get one bar of their own: a narrower range would make ticks such as 1e-9+3e2.
    ends = (low, high) if high - low > 1e-6 * abs(high) else (low - 0.5, low + 0.5)
    edges = np.geomspace(low, high, 40) if log else np.linspace(*ends, 40)
    axes.hist(values, bins=edges.tolist(), color=BLUE)
    axes.set_xscale("log" if log else "linear")
    if not log and (values == values.round()).all():
        axes.locator_params(axis="x", integer=True)
    axes.set_ylabel("samples")


def _bars(axes: "Axes", values: dict[str, float], title: str) -> None:
    axes.set_title(title)
    if not values:
        axes.text(0.5, 0.5, "none", ha="center", va="center")
        axes.set_axis_off()
        return
    names = [name if len(name) <= 32 else name[:31] + "…" for name in values]
    rows = range(len(names))
    axes.barh(list(rows), list(values.values()), color=ORANGE)
    axes.set_yticks(list(rows), names, fontsize=8, parse_math=False)
    axes.invert_yaxis()
