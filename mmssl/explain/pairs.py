"""Pictures of a data set, each with the text that belongs to it."""

import torch
from torch import Tensor

from mmssl.data.decode import DecodeError
from mmssl.data.sample import BadSample
from mmssl.evaluate.datasets import Dataset, captions_of, label_of, read
from mmssl.evaluate.zero_shot import DEFAULT_TEMPLATES, class_weights
from mmssl.model import Model
from mmssl.rng import generator
from mmssl.types import Sample, UserError


def drawn_pairs(model: Model, dataset: Dataset, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Up to `count` pictures drawn from a data set as the model sees them, uint8 [N, 3, S, S], and the unit vectors
    [N, D] of their texts: the first caption, or where there is none the class's prompts.

    Raises:
        UserError: no sample has both.
    """
    samples = list(read(dataset, _left_out))
    rows = sorted(generator(seed, "pairs").permutation(len(samples))[:count].tolist())
    pictures, chosen = [], []
    for sample in (samples[row] for row in rows):
        try:
            pictures.append(model.view(sample.image))
            chosen.append(sample)
        except DecodeError:
            continue
    if not chosen:
        raise UserError(f"no picture of {dataset.name} can be used; run: mmssl shards check")
    return torch.stack(pictures).to(model.device), _texts(model, dataset, chosen).to(model.device)


def _texts(model: Model, dataset: Dataset, samples: list[Sample]) -> Tensor:
    if all("txt" in sample.fields for sample in samples):
        return model.encode_text([captions_of(sample)[0] for sample in samples])
    labels = [label_of(dataset, sample) for sample in samples]
    names = dataset.classnames if dataset.classnames is not None else tuple(sorted(map(str, set(labels))))
    weights = class_weights(model, names, dataset.templates if dataset.templates is not None else DEFAULT_TEMPLATES)
    return weights[[label if isinstance(label, int) else names.index(label) for label in labels]]


def _left_out(bad: BadSample) -> None:
    """What cannot be read cannot be drawn; `mmssl shards check` names it."""
