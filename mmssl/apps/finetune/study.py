"""Accuracy by the number of labels: zero-shot, fine-tuned, and linear probes with and without pretraining."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmssl.apps.finetune.datasets import FineTuneData, LabelledImages
from mmssl.apps.finetune.methods import (
    FineTuneSettings,
    Hits,
    Method,
    accuracy_interval,
    encode_with,
    fine_tune,
    fit_head,
    hits,
    split,
)
from mmssl.evaluate import compare, encode
from mmssl.evaluate.classifiers import logistic_regression
from mmssl.evaluate.metrics import baselines
from mmssl.inference import Model
from mmssl.models import build_dual_encoder
from mmssl.plotting import FAINT, GREEN, drawing, wrapped
from mmssl.rng import generator, torch_seed
from mmssl.stats import Interval, over_draws

PROBE, UNTRAINED = "linear probe", "linear probe, untrained tower"
STATISTICS = 256
"""Images for the batch-norm statistics of an untrained tower."""


@dataclass(frozen=True)
class Study:
    """Outcomes of each test sample."""

    zero_shot: Hits | None
    """Outcomes by the class names alone; None without class names."""
    lines: dict[str, dict[int, list[Hits]]]
    """Classifier -> labels per class -> outcomes, one entry per draw."""
    labels: Tensor
    """Classes of the test samples, int64 [N]."""

    def mean(self, name: str, shots: int) -> Hits:
        """Fraction of draws in which each test sample is right, [N]."""
        found: Hits = np.mean(self.lines[name][shots], axis=0)
        return found

    def differences(self, name: str) -> dict[str, dict[int, compare.Difference]]:
        """Gain of one classifier over zero-shot and over the probe of an untrained tower, paired by sample and draw."""
        found: dict[str, dict[int, list[Hits]]] = {UNTRAINED: self.lines[UNTRAINED]}
        if self.zero_shot is not None:
            fixed = {k: [self.zero_shot] * len(draws) for k, draws in self.lines[name].items()}
            found = {"zero-shot": fixed, **found}
        return {
            other: {
                k: compare.compare_draws(draws, self.lines[name][k], self.labels.numpy())
                for k, draws in by_shots.items()
            }
            for other, by_shots in found.items()
        }

    def baselines(self) -> dict[str, float]:
        """Accuracies without the image: of the most frequent class (`majority`), and by `chance`."""
        return baselines.of_classes(self.labels, ["acc1"])["acc1"]

    def spread(self, name: str, shots: int) -> float | None:
        """Standard deviation of the accuracy over draws; None with one draw."""
        draws = self.lines[name][shots]
        return float(np.std([draw.mean() for draw in draws], ddof=1)) if len(draws) > 1 else None

    def interval(self, name: str, shots: int) -> Interval:
        """The 95 % interval of a mean accuracy, over test samples and draws of labels."""
        over_samples = accuracy_interval(self.mean(name, shots), self.labels)
        return over_draws(over_samples, [float(draw.mean()) for draw in self.lines[name][shots]], (0, 1))

    def zero_shot_interval(self) -> Interval:
        """The 95 % interval of the zero-shot accuracy, over test samples."""
        assert self.zero_shot is not None
        return accuracy_interval(self.zero_shot, self.labels)

    def tuned(self) -> list[str]:
        """The classifiers other than the baselines."""
        return [name for name in self.lines if name not in (PROBE, UNTRAINED)]

    def metrics(self) -> dict[str, Any]:
        """Everything for JSON; intervals are over test samples and draws of labels, `std` is over draws."""
        found: dict[str, Any] = {
            name: {str(k): self._metric(name, k) for k in line} for name, line in self.lines.items()
        }
        if self.zero_shot is not None:
            found["zero-shot"] = {
                "acc1": float(self.zero_shot.mean()),
                "interval": list(self.zero_shot_interval()),
            }
        found["baselines"] = self.baselines()
        return found | {"differences": {name: self._differences(name) for name in self.tuned()}}

    def _metric(self, name: str, shots: int) -> dict[str, Any]:
        mean = self.mean(name, shots)
        return {
            "acc1": float(mean.mean()),
            "interval": list(self.interval(name, shots)),
            "std": self.spread(name, shots),
        }

    def _differences(self, name: str) -> dict[str, Any]:
        return {
            other: {
                str(k): {
                    "difference": d.difference,
                    "interval": list(d.interval),
                    "spread": d.spread,
                    "p_value": d.p_value,
                }
                for k, d in by_shots.items()
            }
            for other, by_shots in self.differences(name).items()
        }


@dataclass(frozen=True)
class StudyDesign:
    """The classifiers of a study."""

    methods: Sequence[Method]
    shots: Sequence[int]
    """Labels per class."""
    seeds: int
    """Draws of labels for each number."""


def study(
    model: Model,
    data: FineTuneData,
    settings: FineTuneSettings,
    design: StudyDesign,
    progress: encode.Progress | None = None,
    finished: Callable[[], None] = lambda: None,
) -> Study:
    """Fine-tune by each method on each number of labels, with linear probes on the same labels.

    Args:
        settings: all but method and shots; the seeds of the draws count up from its seed.
        finished: called after each classifier.

    Raises:
        UserError: a class has too few samples.
    """
    zero = data.zero_shot(model)
    before = None if zero is None else hits(zero.scores(data.test.features), data.test.labels)
    draws = [
        (k, replace(settings, shots=k, seed=settings.seed + number))
        for k in design.shots
        for number in range(design.seeds)
    ]
    bare = _without_pretraining(model, data, [draw for _, draw in draws], progress)
    lines: dict[str, dict[int, list[Hits]]] = {
        name: {k: [] for k in design.shots} for name in (UNTRAINED, PROBE, *design.methods)
    }
    for k, draw in draws:
        lines[UNTRAINED][k].append(_probed(bare, draw))
        lines[PROBE][k].append(_probed(data, draw))
        for method in design.methods:
            lines[method][k].append(fine_tune(model, data, replace(draw, method=method), progress).after)
            finished()
    return Study(before, lines, data.test.labels)


def untrained(model: Model, images: LabelledImages, seed: int) -> Model:
    """The same towers with random weights; batch norms take their statistics from some of the images.

    Without them the features of a deep tower would nearly vanish, and the comparison would be unfair.
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(torch_seed(seed, "untrained"))
        tokenizer = model.tokenizer
        encoder = build_dual_encoder(model.self_contained(), tokenizer.vocab_size, tokenizer.pad_id).to(model.device)
    norms = [module for module in encoder.vision.modules() if isinstance(module, nn.BatchNorm2d)]
    if norms:
        order = generator(seed, "statistics").permutation(len(images.labels))
        pixels, _ = images.render(model, torch.from_numpy(order[:STATISTICS]))
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all batches
            norm.train()
        with torch.no_grad():
            encoder.encode_image(pixels.to(model.device))
    return Model(encoder.eval(), tokenizer, model.config, precision=model.precision)


def _without_pretraining(
    model: Model, data: FineTuneData, draws: Sequence[FineTuneSettings], progress: encode.Progress | None
) -> FineTuneData:
    """The data with the features of an untrained model, for the test samples and the drawn training samples."""
    other = untrained(model, data.train, draws[0].seed)
    rows = torch.cat([part for draw in draws for part in split(data, draw.shots, draw.seed)])
    drawn = torch.from_numpy(np.unique(rows.numpy()))
    features = torch.zeros_like(data.train.features)
    features[drawn] = encode_with(other, data.train.rows(drawn), progress)
    test = encode_with(other, data.test, progress)
    return replace(data, train=replace(data.train, features=features), test=replace(data.test, features=test))


def _probed(data: FineTuneData, settings: FineTuneSettings) -> Hits:
    """A linear probe that begins at zero, as in `mmssl eval --task few_shot`."""
    start = logistic_regression.zeros(len(data.classnames), data.train.features.shape[1])
    rows = split(data, settings.shots, settings.seed)
    head, _ = fit_head(data.train, rows, start, refit=False)
    return hits(head.scores(data.test.features), data.test.labels)


_COLORS = {UNTRAINED: FAINT, PROBE: "#0969da"}
_OTHERS = (GREEN, "#bc4c00", "#8250df")


def draw_study(path: Path, name: str, found: Study) -> None:
    """Write a PNG: one line per classifier, with its 95 % interval as a band.

    Raises:
        UserError: it cannot be written.
    """
    colors = {**_COLORS, **dict(zip(found.tuned(), _OTHERS, strict=False))}
    with drawing(path, 6.4, 4.0, dpi=150, font_size=9) as canvas:
        axes = canvas.add_subplot()
        for way, line in found.lines.items():
            means = [found.mean(way, k) for k in line]
            bands = [found.interval(way, k) for k in line]
            axes.plot(list(line), [100 * m.mean() for m in means], marker="o", color=colors[way], label=way)
            lows, highs = ([100 * band[side] for band in bands] for side in (0, 1))
            axes.fill_between(list(line), lows, highs, color=colors[way], alpha=0.15, linewidth=0)
        if found.zero_shot is not None:
            low, high = (100 * end for end in found.zero_shot_interval())
            axes.axhline(100 * found.zero_shot.mean(), color="black", linestyle="--", label="zero-shot")
            axes.axhspan(low, high, color="black", alpha=0.07, linewidth=0)
        axes.axhline(100 * found.baselines()["majority"], color=FAINT, linestyle=":", label="most frequent class")
        ticks = sorted({k for line in found.lines.values() for k in line})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(k) for k in ticks])
        axes.set(xlabel="labels per class to train on", ylabel="accuracy on the test split (%)")
        axes.set_title(wrapped(name, 50, 2), parse_math=False)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
