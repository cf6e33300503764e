"""Detection of images whose class is none of the known ones (Ming et al. 2022; Sun et al. 2022)."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from mmssl.errors import UserError
from mmssl.evaluate.datasets import Dataset
from mmssl.evaluate.labels import class_indices, sample_label
from mmssl.evaluate.metrics import novelty
from mmssl.evaluate.task import Metrics, Task, TaskContext, list_baselines, list_intervals
from mmssl.files import write_csv
from mmssl.rng import generator
from mmssl.stats import Rows, bootstrap
from mmssl.types import Sample

DRAWS = 5
"""Draws of the unknown half of the classes."""
RESAMPLES = 200
NEIGHBOURS = 5
"""An image is as known as its similarity to the 5th nearest known image."""
RECALL = 0.95
"""Fraction of known images that pass the threshold of `fpr95`."""
Score = Callable[[Tensor], Tensor]
"""The known classes, bool [C] -> a score of every image that is high for known ones, [N]."""


class Novelty(Task):
    """Half of the classes are unknown: their images should have low scores."""

    name = "novelty"
    label = "detection of unknown classes"
    description = "Images of unknown classes, told from known ones by their highest similarity to a class or an image."
    main_metrics = ("auroc_prompts", "auroc_images")

    def check(self, dataset: Dataset, sample: Sample) -> None:
        """Require a label that fits the class names."""
        sample_label(dataset, sample)

    def run(self, context: TaskContext) -> Metrics:
        """Measure by prompts of the known classes, and, with a training split, by its images of them.

        Raises:
            UserError: there are fewer than two classes, or neither class names nor a training split.
        """
        reference = None
        if context.dataset.train is None:
            names, labels = class_indices(context.dataset, context.images.samples)
        else:
            train, train_labels, labels, names = context.labelled_training()
            reference = train.features, train_labels
        present = torch.unique(labels)
        if len(present) < 2:
            raise UserError(f"task 'novelty' of dataset {context.name!r} needs two classes; it has one")
        known = draw_known(present, len(names))
        scored = {way: [score(draw) for draw in known] for way, score in _scores(context, names, reference).items()}
        inside = [draw[labels] for draw in known]

        def measure(rows: Rows) -> dict[str, float]:
            found = {}
            for way, scores in scored.items():
                parts = [(s[rows][i[rows]], s[rows][~i[rows]]) for s, i in zip(scores, inside, strict=True)]
                both = [(a, b) for a, b in parts if len(a) and len(b)]  # a resample of a few images may lack one side
                found[f"auroc_{way}"] = _mean([novelty.auroc(a, b) for a, b in both])
                found[f"fpr95_{way}"] = _mean([novelty.fpr_at(a, b, RECALL) for a, b in both])
            return found

        if context.folder is not None:
            lines = ((n, names[c], int(draw[c])) for n, draw in enumerate(known) for c in present.tolist())
            write_csv(context.folder / "classes.csv", ("draw", "class", "known"), lines)
        metrics = measure(np.arange(len(labels)))
        # Large classes are resampled each by itself, so that no resample lacks known or unknown images.
        intervals = bootstrap(measure, len(labels), resamples=RESAMPLES, strata=labels.numpy())
        chance = {name: {"chance": 0.5 if name.startswith("auroc") else RECALL} for name in metrics}
        return {
            **metrics,
            "samples": len(labels),
            "classes": len(present),
            **list_intervals(intervals),
            **list_baselines(chance),
        }


def draw_known(present: Tensor, classes: int, draws: int = DRAWS, seed: int = 0) -> list[Tensor]:
    """Masks of the known classes, bool [C]: half of those that occur, rounded up, drawn at random.

    Args:
        present: the classes that occur, int64. classes: the number C of all.
    """
    rng, found = generator(seed, "known classes"), []
    for _ in range(draws):
        mask = torch.zeros(classes, dtype=torch.bool)
        mask[present[torch.from_numpy(rng.permutation(len(present)))[: (len(present) + 1) // 2]]] = True
        found.append(mask)
    return found


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else float("nan")


def _scores(context: TaskContext, names: tuple[str, ...], reference: tuple[Tensor, Tensor] | None) -> dict[str, Score]:
    """The ways to score that the dataset allows.

    Args:
        reference: features [M, D] and labels [M] of the training images, if there are any.

    Raises:
        UserError: it allows none.
    """
    features, found = context.images.features, dict[str, Score]()
    if context.dataset.classnames is not None or not all(name.lstrip("-").isdecimal() for name in names):
        similarities = features @ context.class_weights(names).T
        found["prompts"] = lambda known: similarities[:, known].amax(dim=1)
    if reference is not None:
        to_images, owners = features @ reference[0].T, reference[1]
        found["images"] = lambda known: nearest(to_images[:, known[owners]])
    if not found:
        raise UserError(
            f"task 'novelty' of dataset {context.name!r} needs class names (--classnames FILE) or a training split"
        )
    return found


def nearest(similarities: Tensor, k: int = NEIGHBOURS) -> Tensor:
    """Similarity to the k-th nearest image, or to the last one if there are fewer, [N].

    Args:
        similarities: to M images, [N, M]. Without any image: 0.
    """
    count = min(k, similarities.shape[1])
    return similarities.topk(count, dim=1).values[:, -1] if count else torch.zeros(len(similarities))
