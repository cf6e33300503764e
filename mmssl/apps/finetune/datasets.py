"""Labelled images to train and to judge a classifier on, with what a model makes of them."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mmssl.errors import UserError
from mmssl.evaluate.classifiers import logistic_regression as probe
from mmssl.evaluate.classifiers.fine_tuning import rendered
from mmssl.evaluate.classifiers.logistic_regression import Linear
from mmssl.evaluate.datasets import Dataset, open_dataset, training_split
from mmssl.evaluate.encode import ALONE, EncodedImages, Progress
from mmssl.evaluate.feature_cache import FeatureCache
from mmssl.evaluate.labels import class_indices, sample_label
from mmssl.evaluate.prompts import Templates
from mmssl.evaluate.suite import EncodedDataset
from mmssl.evaluate.tasks import zero_shot
from mmssl.inference import Model
from mmssl.types import Sample

HELD_OUT = 0.2
"""Share of the samples that are kept to judge where there is no test split, and of those to train on to choose by."""


@dataclass(frozen=True)
class Labelled:
    """N images of a data set, in its order."""

    dataset: Dataset
    samples: list[Sample]
    """Their records, without image bytes."""
    features: Tensor
    """The model's unit vectors, [N, D]."""
    labels: Tensor
    """int64 [N]."""

    def rows(self, chosen: Tensor) -> "Labelled":
        """Some of them, in their order."""
        samples = [self.samples[index] for index in chosen.tolist()]
        return Labelled(self.dataset, samples, self.features[chosen], self.labels[chosen])

    def shown(self, model: Model, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Some of them as the model sees them, uint8 [n, 3, S, S], and their labels [n]."""
        if len(chosen) == 0:
            return torch.empty(0, 3, 0, 0, dtype=torch.uint8), self.labels[chosen]
        return rendered(model, self.dataset, [self.samples[i] for i in chosen.tolist()]), self.labels[chosen]


@dataclass(frozen=True)
class FineTuneData:
    """What is to be learnt."""

    name: str
    classnames: tuple[str, ...]
    templates: Templates
    named: bool
    """Whether the classes have names that mean something, so that they can be told apart without a label."""
    train: Labelled
    test: Labelled
    notes: list[str]
    """What a person should know of the split, a line each."""

    def zero_shot(self, model: Model, progress: Progress | None = None) -> Linear | None:
        """The classifier of the class names, its logits scaled as the model scales them; None where there are none."""
        if not self.named:
            return None
        vectors = zero_shot.class_weights(model, self.classnames, self.templates, progress=progress).double()
        return Linear(model.logit_scale * vectors, torch.zeros(len(vectors), dtype=torch.float64))


def gather(
    model: Model,
    data: str,
    *,
    test: str | None = None,
    classnames: str | None = None,
    templates: str | None = None,
    label: str | None = None,
    seed: int = 0,
    batch_size: int = 256,
    cache: FeatureCache | None = None,
    progress: Progress | None = None,
) -> FineTuneData:
    """Read and encode the images to train and to judge on.

    Args:
        data: a folder in CLIP_benchmark's layout with a training split, or a pattern of shards to train on.
        test: folder or pattern of what to judge on. Default: the folder's test split; with a pattern of shards, a fifth
            of each class, drawn by `seed`, which is then not trained on.
        classnames, templates, label: as `open_dataset` takes them.
        cache: where the model's features are kept. None: nowhere.

    Raises:
        UserError: shards or labels are missing or do not fit.
    """
    opened = open_dataset(data, classnames=classnames, templates=templates, label=label)
    datasets = [training_split(opened) if opened.train is not None else opened]
    if test is not None:
        datasets.append(open_dataset(test, classnames=opened.classnames, templates=templates, label=label))
    elif opened.train is not None:
        datasets.append(opened)
    notes: list[str] = []
    embedding = EncodedDataset(model, batch_size, cache, ALONE, progress)
    found = [_embedded(embedding, dataset, notes) for dataset in datasets]
    names, labels = class_indices(datasets[0], [sample for images in found for sample in images.samples])
    if len(names) < 2:
        raise UserError(f"{data} has one class only ({names[0]!r}); a classifier needs two")
    parts_of_labels = labels.split_with_sizes([len(images.samples) for images in found])
    parts = [
        Labelled(dataset, images.samples, images.features, part)
        for dataset, images, part in zip(datasets, found, parts_of_labels, strict=True)
    ]
    train, tested = parts if len(parts) == 2 else _apart(parts[0], seed, notes)
    if len(tested.samples) == 0:
        raise UserError(f"{data} has too few samples to keep some to judge on; give others by --test")
    return FineTuneData(
        name=opened.name,
        classnames=names,
        templates=opened.templates if opened.templates is not None else zero_shot.DEFAULT_TEMPLATES,
        named=not all(_is_number(name) for name in names),
        train=train,
        test=tested,
        notes=notes,
    )


def _apart(whole: Labelled, seed: int, notes: list[str]) -> tuple[Labelled, Labelled]:
    """Samples to train on, and a share of each class to judge on."""
    rows, kept = probe.hold_out(whole.labels, HELD_OUT, seed)
    notes.append(f"no test split: {len(kept)} of {len(whole.samples)} samples are kept to judge (--test names others)")
    return whole.rows(rows), whole.rows(kept)


def _embedded(embedding: EncodedDataset, dataset: Dataset, notes: list[str]) -> EncodedImages:
    found = embedding.of(dataset, dataset.name, [partial(sample_label, dataset)])
    if found.bad:
        first = found.bad[0]
        notes.append(f"left out {len(found.bad)} bad samples, first {first.shard}:{first.key}: {first.error}")
    return found


def _is_number(name: str) -> bool:
    return name.strip().lstrip("+-").isdecimal()
