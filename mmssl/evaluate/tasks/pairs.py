"""Hard pairs: an image's caption among captions that differ in a word or in their order.

A sample has its caption and, in its JSON member, either `negatives`, the wrong captions (SugarCrepe, ARO), or `group`,
the same value for two samples whose captions are each other's wrong ones (Winoground).
"""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmssl.errors import UserError
from mmssl.evaluate.datasets import Dataset
from mmssl.evaluate.labels import UnusableSampleError, image_captions
from mmssl.evaluate.metrics import pairs
from mmssl.evaluate.task import Metrics, Task, TaskContext, list_baselines, list_intervals, write_outcomes
from mmssl.stats import means
from mmssl.types import Sample

NEGATIVES, GROUP = "negatives", "group"


class HardPairs(Task):
    """The right caption among hard ones."""

    name = "pairs"
    label = "hard pairs"
    description = "The right caption of an image, and the right image of a caption, among those that nearly fit."
    main_metrics = ("caption_accuracy", "group_score", "text_score", "image_score")
    paired = True

    def check(self, dataset: Dataset, sample: Sample) -> None:
        """Require a caption, and wrong captions or a group."""
        image_captions(sample)
        if sample.fields.get(GROUP) is None:
            wrong_captions(sample)

    def run(self, context: TaskContext) -> Metrics:
        """Measure groups if the samples have them, else captions among wrong ones.

        Raises:
            UserError: some samples have a group and others do not, or no group is two samples.
        """
        samples = context.images.samples
        grouped = [sample.fields.get(GROUP) is not None for sample in samples]
        if any(grouped) and not all(grouped):
            odd = samples[grouped.index(not grouped[0])]
            raise UserError(
                f"{odd.key} in {odd.shard}: some samples of dataset {context.name!r} have a {GROUP!r} and others do "
                "not; evaluate them as two datasets"
            )
        return self._groups(context) if grouped[0] else self._captions(context)

    def _captions(self, context: TaskContext) -> Metrics:
        samples = context.images.samples
        wrong = [wrong_captions(sample) for sample in samples]
        owner = torch.tensor([row for row, texts in enumerate(wrong) for _ in texts])
        features = context.encode_texts([image_captions(sample)[0] for sample in samples])
        others = context.encode_texts([text for texts in wrong for text in texts])
        images = context.images.features
        own, near = (images * features).sum(dim=1), (images[owner] * others).sum(dim=1)
        right = pairs.right_first(own, near, owner).double().numpy()
        chance = float(np.mean([1 / (1 + len(texts)) for texts in wrong]))
        counts = {"samples": len(samples), "wrong_captions": len(owner)}
        return _summary(context, samples, {"caption_accuracy": right}, {"caption_accuracy": chance}) | counts

    def _groups(self, context: TaskContext) -> Metrics:
        samples = context.images.samples
        rows = group_rows(samples, context.name)
        images = context.images.features[rows]  # [G, 2, D]
        texts = context.encode_texts([image_captions(samples[row])[0] for row in rows.flatten().tolist()])
        scores = pairs.group_scores(images @ texts.view_as(images).transpose(1, 2))
        values = {name: found.double().numpy() for name, found in scores.items()}
        chances = {"text_score": pairs.TEXT_CHANCE, "image_score": pairs.TEXT_CHANCE, "group_score": pairs.GROUP_CHANCE}
        firsts = [samples[row] for row in rows[:, 0].tolist()]
        counts = {"samples": len(samples), "groups": len(rows)}
        if rows.numel() < len(samples):  # the image of a partner could not be used
            counts["samples_without_partner"] = len(samples) - rows.numel()
        return _summary(context, firsts, values, chances) | counts


def wrong_captions(sample: Sample) -> list[str]:
    """The wrong captions of a sample: a text or a list of texts.

    Raises:
        UnusableSampleError: it has none.
    """
    found = sample.fields.get(NEGATIVES)
    texts = [found] if isinstance(found, str) else found
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise UnusableSampleError(
            sample,
            f"it has neither wrong captions nor a group; its .json needs {NEGATIVES!r}, a list of texts, or {GROUP!r}, "
            "the same value in two samples",
        )
    return texts


def group_rows(samples: list[Sample], name: str) -> Tensor:
    """The two rows of each whole group, in the order of their first ones, int64 [G, 2].

    Args:
        name: of the dataset, for messages.

    Raises:
        UserError: a group has more than two samples, or none has two.
    """
    rows: dict[str, list[int]] = {}
    for row, sample in enumerate(samples):
        rows.setdefault(str(sample.fields[GROUP]), []).append(row)
    whole = [members for members in rows.values() if len(members) == 2]
    odd = next((group for group, members in rows.items() if len(members) > 2 or not whole), None)
    if odd is not None:
        raise UserError(
            f"group {odd!r} of dataset {name!r} has {len(rows[odd])} usable samples; a group is two samples, whose "
            "captions are each other's wrong ones"
        )
    return torch.tensor(whole)


def _summary(
    context: TaskContext,
    samples: list[Sample],
    values: Mapping[str, NDArray[np.float64]],
    chances: Mapping[str, float],
) -> Metrics:
    """Means with intervals and chances; outcomes.csv."""
    metrics, intervals = means(values)
    write_outcomes(context, samples, values)
    baselines = list_baselines({name: {"chance": value} for name, value in chances.items()})
    return metrics | list_intervals(intervals) | baselines
