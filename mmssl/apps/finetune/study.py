"""Accuracy by the number of labels: zero-shot, fine-tuned, and linear probes with and without pretraining."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from mmssl.apps.finetune.datasets import FineTuneData, Labelled
from mmssl.apps.finetune.methods import (
    FineTuneSettings,
    Method,
    Right,
    accuracy_interval,
    encode_again,
    fine_tune,
    fit_head,
    right,
    split,
)
from mmssl.evaluate.classifiers import logistic_regression as probe
from mmssl.evaluate.compare import Difference, compare
from mmssl.evaluate.encode import Progress
from mmssl.inference import Model
from mmssl.models.dual_encoder import build_dual_encoder
from mmssl.rng import generator, torch_seed

PROBE, UNTRAINED = "linear probe", "linear probe, untrained tower"
STATISTICS = 256
"""Images from which an untrained tower's batch norms take their statistics."""


@dataclass(frozen=True)
class Study:
    """What became of each test sample."""

    zero_shot: Right | None
    """By the class names alone; None where the classes have none."""
    lines: dict[str, dict[int, list[Right]]]
    """Way to classify -> number of labels a class -> one entry a draw."""

    def mean(self, name: str, shots: int) -> Right:
        """How often each test sample is right, over draws."""
        found: Right = np.mean(self.lines[name][shots], axis=0)
        return found

    def differences(self, name: str) -> dict[str, dict[int, Difference]]:
        """How much better one way is than zero-shot and than the probe of an untrained tower."""
        found: dict[str, dict[int, Right]] = {UNTRAINED: {k: self.mean(UNTRAINED, k) for k in self.lines[name]}}
        if self.zero_shot is not None:
            found = {"zero-shot": dict.fromkeys(self.lines[name], self.zero_shot), **found}
        return {
            other: {k: compare(values, self.mean(name, k)) for k, values in by_shots.items()}
            for other, by_shots in found.items()
        }

    def tuned(self) -> list[str]:
        """The ways that are no baseline."""
        return [name for name in self.lines if name not in (PROBE, UNTRAINED)]

    def figures(self) -> dict[str, Any]:
        """All of it as JSON holds it; intervals are over test samples, `std` is over draws."""
        found: dict[str, Any] = {
            name: {str(k): self._metric(name, k) for k in line} for name, line in self.lines.items()
        }
        if self.zero_shot is not None:
            found["zero-shot"] = {
                "acc1": float(self.zero_shot.mean()),
                "interval": list(accuracy_interval(self.zero_shot)),
            }
        return found | {"differences": {name: self._differences(name) for name in self.tuned()}}

    def _metric(self, name: str, shots: int) -> dict[str, Any]:
        draws, mean = self.lines[name][shots], self.mean(name, shots)
        std = float(np.std([draw.mean() for draw in draws], ddof=1)) if len(draws) > 1 else None
        return {"acc1": float(mean.mean()), "interval": list(accuracy_interval(mean)), "std": std}

    def _differences(self, name: str) -> dict[str, Any]:
        return {
            other: {
                str(k): {"difference": d.difference, "interval": list(d.interval), "p_value": d.p_value}
                for k, d in by_shots.items()
            }
            for other, by_shots in self.differences(name).items()
        }


def study(
    model: Model,
    problem: FineTuneData,
    settings: FineTuneSettings,
    methods: Sequence[Method],
    shots: Sequence[int],
    seeds: int,
    progress: Progress | None = None,
    finished: Callable[[], None] = lambda: None,
) -> Study:
    """Fine-tune by each method on each number of labels a class, `seeds` times, beside linear probes on the same ones.

    Args:
        settings: all but method, shots and seed; the draws' seeds count up from its own.
        finished: called after each classifier.

    Raises:
        UserError: a class has too few samples.
    """
    zero = problem.zero_shot(model)
    before = None if zero is None else right(zero.scores(problem.test.features), problem.test.labels)
    draws = [(k, replace(settings, shots=k, seed=settings.seed + number)) for k in shots for number in range(seeds)]
    bare = _bare(model, problem, [draw for _, draw in draws], progress)
    lines: dict[str, dict[int, list[Right]]] = {name: {k: [] for k in shots} for name in (UNTRAINED, PROBE, *methods)}
    for k, draw in draws:
        lines[UNTRAINED][k].append(_probed(bare, draw))
        lines[PROBE][k].append(_probed(problem, draw))
        for method in methods:
            lines[method][k].append(fine_tune(model, problem, replace(draw, method=method), progress).after)
            finished()
    return Study(before, lines)


def untrained(model: Model, labelled: Labelled, seed: int) -> Model:
    """The same towers with random weights; batch norms take their statistics from some of the images.

    Without that a deep tower's features would all but vanish, and the comparison would be unfair.
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(torch_seed(seed, "untrained"))
        tokenizer = model.tokenizer
        encoder = build_dual_encoder(model.self_contained(), tokenizer.vocab_size, tokenizer.pad_id).to(model.device)
    norms = [module for module in encoder.vision.modules() if isinstance(module, nn.BatchNorm2d)]
    if norms:
        order = generator(seed, "statistics").permutation(len(labelled.labels))
        images, _ = labelled.shown(model, torch.from_numpy(order[:STATISTICS]))
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all batches
            norm.train()
        with torch.no_grad():
            encoder.encode_image(images.to(model.device))
    return Model(encoder.eval(), tokenizer, model.config)


def _bare(
    model: Model, problem: FineTuneData, draws: Sequence[FineTuneSettings], progress: Progress | None
) -> FineTuneData:
    """The problem as an untrained model sees it: the test samples, and the training samples that are drawn."""
    other = untrained(model, problem.train, draws[0].seed)
    rows = torch.cat([part for draw in draws for part in split(problem, draw.shots, draw.seed)])
    drawn = torch.from_numpy(np.unique(rows.numpy()))
    features = torch.zeros_like(problem.train.features)
    features[drawn] = encode_again(other, problem.train.rows(drawn), progress)
    test = encode_again(other, problem.test, progress)
    return replace(problem, train=replace(problem.train, features=features), test=replace(problem.test, features=test))


def _probed(problem: FineTuneData, settings: FineTuneSettings) -> Right:
    """A linear probe that begins at zero, as `mmssl eval --task few_shot` does it."""
    start = probe.zeros(len(problem.classnames), problem.train.features.shape[1])
    rows = split(problem, settings.shots, settings.seed)
    head, _ = fit_head(problem.train, rows, start, refit=False)
    return right(head.scores(problem.test.features), problem.test.labels)
