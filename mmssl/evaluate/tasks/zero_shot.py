"""Zero-shot classification with an ensemble of prompts per class (Radford et al. 2021, section 3.1.4)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mmssl.distributed import World
from mmssl.evaluate.datasets import Dataset
from mmssl.evaluate.encode import ALONE, EncodedImages, Encoder, Progress, encode_texts
from mmssl.evaluate.labels import class_indices
from mmssl.evaluate.metrics import ranking as metrics
from mmssl.evaluate.metrics.classification import Classification, evaluate_predictions, list_length
from mmssl.evaluate.prompts import Templates, fill

DEFAULT_TEMPLATES: Templates = ("a photo of a {c}.",)
"""Used where neither the data nor the user brings templates."""


@dataclass(frozen=True)
class ZeroShot:
    """A model's zero-shot classification of a data set."""

    judged: Classification
    weights: Tensor
    """The class vectors, [C, D]."""


def dataset_templates(dataset: Dataset) -> Templates:
    """The data set's own prompt templates, or the usual one."""
    return dataset.templates if dataset.templates is not None else DEFAULT_TEMPLATES


def class_weights(
    encoder: Encoder,
    classnames: Sequence[str],
    templates: Templates,
    *,
    batch_size: int = 256,
    world: World = ALONE,
    progress: Progress | None = None,
) -> Tensor:
    """One vector a class: the mean of its prompts' normed features, normed again. [C, D]."""
    prompts = fill(classnames, templates)
    texts = [text for of_class in prompts for text in of_class]
    owner = torch.tensor([index for index, of_class in enumerate(prompts) for _ in of_class])
    features = encode_texts(encoder, texts, batch_size=batch_size, world=world, progress=progress)
    totals = torch.zeros(len(prompts), features.shape[1]).index_add_(0, owner, features)
    counts = torch.tensor([len(of_class) for of_class in prompts])[:, None]
    return F.normalize(totals / counts, dim=-1)


def evaluate(
    encoder: Encoder,
    dataset: Dataset,
    images: EncodedImages,
    *,
    batch_size: int = 256,
    logit_scale: float | None = None,
    world: World = ALONE,
    progress: Progress | None = None,
) -> ZeroShot:
    """Classify the images of a data set by its class names.

    Args:
        logit_scale: factor from similarities to logits, for the calibration error; without it there is none.
    Raises:
        UserError: labels and class names do not fit.
    """
    classnames, labels = class_indices(dataset, images.samples)
    weights = class_weights(
        encoder, classnames, dataset_templates(dataset), batch_size=batch_size, world=world, progress=progress
    )
    outcome = metrics.top_k(images.features, weights, list_length(len(weights)))
    confidence = None if logit_scale is None else metrics.confidence(images.features, weights, logit_scale)
    return ZeroShot(evaluate_predictions(outcome, labels, classnames, confidence), weights)
