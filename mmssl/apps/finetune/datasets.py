"""Labelled images to train and to test a classifier on, with a model's features of them."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmssl.errors import UserError
from mmssl.evaluate import datasets, encode, labels, open_dataset, prompts, suite
from mmssl.evaluate.classifiers import fine_tuning, logistic_regression
from mmssl.inference import Model
from mmssl.types import Sample

HELD_OUT = 0.2
"""Fraction of the samples held out for testing where there is no test split, and of the training samples held out to
choose settings."""


@dataclass(frozen=True)
class LabelOptions:
    """Source of labels and class names, as for `open_dataset`."""

    classnames: str | None = None
    templates: str | None = None
    label: str | None = None


@dataclass(frozen=True)
class LabelledImages:
    """N images of a dataset, in its order."""

    samples: list[Sample]
    """Their records, without image bytes."""
    features: Tensor
    """The model's unit vectors, [N, D]."""
    labels: Tensor
    """int64 [N]."""

    def rows(self, chosen: Tensor) -> "LabelledImages":
        """Some of them, in their order."""
        samples = [self.samples[index] for index in chosen.tolist()]
        return LabelledImages(samples, self.features[chosen], self.labels[chosen])

    def render(self, model: Model, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Some of them as the model sees them, uint8 [n, 3, S, S], and their labels [n]."""
        return fine_tuning.render_labelled(model, self.samples, self.labels, chosen)


@dataclass(frozen=True)
class FineTuneData:
    """The classes, and the images to train and to test on."""

    name: str
    classnames: tuple[str, ...]
    templates: prompts.Templates
    named: bool
    """The class names are words, so that a zero-shot classifier exists."""
    train: LabelledImages
    test: LabelledImages
    notes: list[str]
    """Remarks about the split, one line each."""

    def zero_shot(self, model: Model, progress: encode.Progress | None = None) -> logistic_regression.Linear | None:
        """The classifier of the class names, with the model's logit scale; None without class names."""
        if not self.named:
            return None
        vectors = encode.class_weights(model, self.classnames, self.templates, progress=progress).double()
        return logistic_regression.Linear(model.logit_scale * vectors, torch.zeros(len(vectors), dtype=torch.float64))


def gather(
    model: Model,
    data: str,
    *,
    test: str | None = None,
    label_options: LabelOptions | None = None,
    seed: int = 0,
    options: suite.SuiteOptions | None = None,
) -> FineTuneData:
    """Read and encode the images to train and to test on.

    Args:
        data: a folder in CLIP_benchmark's layout with a training split, a pattern of shards to train on, a folder of
            images per class, or a table with a column of labels.
        test: folder or pattern of the test images. Default: the folder's test split; with a pattern of shards, a fifth
            of each class, drawn by `seed`, which is then not trained on.
        options: of the encoding: batch size, cache, progress.

    Raises:
        UserError: shards or labels are missing or do not fit, or a test image is trained on.
    """
    chosen = label_options or LabelOptions()
    options = options or suite.SuiteOptions()
    opened = open_labelled_images(data, chosen, options)
    splits = [datasets.training_split(opened) if opened.train is not None else opened]
    if test is not None:
        splits.append(open_labelled_images(test, chosen, options, opened.classnames))
    elif opened.train is not None:
        splits.append(opened)
    notes: list[str] = []
    classnames, parts = _label(model, splits, options)
    if len(classnames) < 2:
        raise UserError(f"{data} has one class only ({classnames[0]!r}); a classifier needs two")
    train, tested = parts if len(parts) == 2 else _split(parts[0], seed, notes)
    if len(tested.samples) == 0:
        raise UserError(f"no class of {data} has 3 images, to hold one out for testing; give others by --test")
    _refuse_shared(train.samples, tested.samples)
    notes += _remarks(classnames, tested.labels)
    return FineTuneData(
        name=opened.name,
        classnames=classnames,
        templates=datasets.class_templates(opened),
        named=not all(_is_number(name) for name in classnames),
        train=train,
        test=tested,
        notes=notes,
    )


def open_labelled_images(
    data: str, chosen: LabelOptions, options: suite.SuiteOptions, classnames: Sequence[str] | None = None
) -> datasets.Dataset:
    """Open shards, a folder of images per class, or a table.

    Args:
        classnames: the names themselves, in place of those that the options name.
    """
    names = chosen.classnames if classnames is None else classnames
    common: dict[str, Any] = {"classnames": names, "templates": chosen.templates, "label": chosen.label}
    return datasets.open_images(data, bad_samples=options.bad_samples, **common) or open_dataset(data, **common)


def _label(
    model: Model, splits: Sequence[datasets.Dataset], options: suite.SuiteOptions
) -> tuple[tuple[str, ...], list[LabelledImages]]:
    """The class names, and the images of each split with features and labels."""
    encoder = suite.DatasetEncoder(model, options)
    found = []
    for split in splits:
        labelled = partial(labels.sample_label, split)
        images = suite.usable_images(encoder.encode(split, split.name, [labelled]), labelled)
        suite.report_bad(split.name, images, options)
        found.append(images)
    names, indices = labels.class_indices(splits[0], [sample for images in found for sample in images.samples])
    parts = indices.split_with_sizes([len(images.samples) for images in found])
    return names, [LabelledImages(i.samples, i.features, part) for i, part in zip(found, parts, strict=True)]


def _split(images: LabelledImages, seed: int, notes: list[str]) -> tuple[LabelledImages, LabelledImages]:
    """Samples to train on, and a fraction of each class to test on."""
    rows, kept = logistic_regression.hold_out(images.labels, HELD_OUT, seed)
    notes.append(
        f"no test split: {len(kept)} of {len(images.samples)} samples are held out for testing (--test names others)"
    )
    return images.rows(rows), images.rows(kept)


def _refuse_shared(train: Sequence[Sample], test: Sequence[Sample]) -> None:
    known = {(sample.shard, sample.key) for sample in train}
    shared = [sample for sample in test if (sample.shard, sample.key) in known]
    if shared:
        raise UserError(
            f"{len(shared):,} of {len(test):,} test images are trained on too, such as {labels.locate(shared[0])}; "
            "name others by --test, or leave it out"
        )


def _remarks(classnames: Sequence[str], tested: Tensor) -> list[str]:
    """Remarks about classes that are probably one, and about classes that are not tested."""
    alike: dict[str, list[str]] = {}
    for name in classnames:
        alike.setdefault(" ".join(unicodedata.normalize("NFKC", name).casefold().split()), []).append(name)
    notes = [
        f"classes {', '.join(map(repr, names))} differ in case or spaces alone: if they are one, correct their labels"
        for names in alike.values()
        if len(set(names)) > 1
    ]
    without = [name for number, name in enumerate(classnames) if not (tested == number).any()]
    if without:
        notes.append(f"{len(without):,} of {len(classnames):,} classes have no test image, such as {without[0]!r}")
    return notes


def _is_number(name: str) -> bool:
    return re.fullmatch(r"[+-]?\d+(\.\d+)?", name.strip()) is not None
