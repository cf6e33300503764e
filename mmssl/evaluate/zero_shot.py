"""Zero-shot classification with an ensemble of prompts per class (Radford et al. 2021, section 3.1.4)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mmssl.evaluate import metrics
from mmssl.evaluate.datasets import Dataset, labels_of
from mmssl.evaluate.embed import Encoder, Pictures, Progress, embed_texts
from mmssl.evaluate.metrics import ClassRow, Confusion
from mmssl.evaluate.prompts import Templates, fill

DEFAULT_TEMPLATES: Templates = ("a photo of a {c}.",)
"""Used where neither the data nor the user brings templates."""


@dataclass(frozen=True)
class ZeroShot:
    """A model's zero-shot classification of a data set. N samples, C classes."""

    metrics: dict[str, float]
    """`acc1`, `acc5` (from 5 classes on), `mean_per_class_recall`, `calibration_error` (with a logit scale),
    `classes` C and `samples` N."""
    classnames: tuple[str, ...]
    per_class: list[ClassRow]
    confusions: list[Confusion]
    """Every wrong pair of label and prediction, the most frequent first."""
    labels: Tensor
    """int64 [N]."""
    predictions: Tensor
    """int64 [N]."""
    best: Tensor
    """The 5 best classes (1 where there are fewer than 5), best first, int64 [N, k]."""
    similarity: Tensor
    """Their cosine similarities, [N, k]."""
    weights: Tensor
    """The class vectors, [C, D]."""


def class_weights(
    encoder: Encoder,
    classnames: Sequence[str],
    templates: Templates,
    *,
    batch_size: int = 256,
    progress: Progress | None = None,
) -> Tensor:
    """One vector a class: the mean of its prompts' normed features, normed again. [C, D]."""
    prompts = fill(classnames, templates)
    owner = torch.tensor([index for index, texts in enumerate(prompts) for _ in texts])
    features = embed_texts(
        encoder, [t for texts in prompts for t in texts], batch_size=batch_size, progress=progress
    )
    totals = torch.zeros(len(prompts), features.shape[1]).index_add_(0, owner, features)
    counts = torch.tensor([len(texts) for texts in prompts])[:, None]
    return F.normalize(totals / counts, dim=-1)


def evaluate(
    encoder: Encoder,
    dataset: Dataset,
    pictures: Pictures,
    *,
    batch_size: int = 256,
    logit_scale: float | None = None,
    progress: Progress | None = None,
) -> ZeroShot:
    """Classify the pictures of a data set by its class names.

    Args:
        logit_scale: factor from similarities to logits, for the calibration error; without it there is none.
    Raises:
        UserError: labels and class names do not fit.
    """
    classnames, labels = labels_of(pictures.samples, dataset)
    templates = dataset.templates if dataset.templates is not None else DEFAULT_TEMPLATES
    weights = class_weights(encoder, classnames, templates, batch_size=batch_size, progress=progress)
    return classify(pictures.features, labels, weights, classnames, logit_scale=logit_scale)


def classify(
    features: Tensor,
    labels: Tensor,
    weights: Tensor,
    classnames: Sequence[str],
    *,
    logit_scale: float | None = None,
) -> ZeroShot:
    """Compare features [N, D] with class vectors [C, D] and judge the result against the labels [N]."""
    k = 5 if len(weights) >= 5 else 1
    outcome = metrics.top_k(features, weights, k)
    figures: dict[str, float] = {
        f"acc{n}": metrics.top_k_accuracy(outcome.best, labels, n) for n in (1, 5) if n <= k
    }
    figures["mean_per_class_recall"] = metrics.mean_per_class_recall(outcome.first, labels)
    if logit_scale is not None:
        confidence = metrics.confidence(features, weights, logit_scale)
        figures["calibration_error"] = metrics.expected_calibration_error(confidence, outcome.first == labels)
    figures |= {"classes": len(weights), "samples": len(labels)}
    return ZeroShot(
        metrics=figures,
        classnames=tuple(classnames),
        per_class=metrics.per_class(outcome.first, labels, classnames),
        confusions=metrics.most_confused(outcome.first, labels),
        labels=labels,
        predictions=outcome.first,
        best=outcome.best,
        similarity=outcome.scores,
        weights=weights,
    )
