"""Images of a data set, each with the text that belongs to it."""

import torch
from torch import Tensor

from mmssl.data.transforms import DecodeError
from mmssl.errors import UserError
from mmssl.evaluate.datasets import Dataset, read_again
from mmssl.evaluate.labels import class_indices, image_captions
from mmssl.evaluate.tasks.zero_shot import class_weights, dataset_templates
from mmssl.inference import Model
from mmssl.rng import generator
from mmssl.types import Sample


def drawn_pairs(model: Model, dataset: Dataset, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Up to `count` images drawn from a data set as the model sees them, uint8 [N, 3, S, S], and the unit vectors
    [N, D] of their texts: the first caption, or where there is none the class's prompts.

    Raises:
        UserError: no sample has both.
    """
    total = sum(1 for _ in read_again(dataset))
    rows = set(generator(seed, "pairs").permutation(total)[:count].tolist())
    images, chosen = [], []
    for row, sample in enumerate(read_again(dataset)):
        if row not in rows:
            continue
        try:
            images.append(model.view(sample.image))
            chosen.append(sample)
        except DecodeError:
            continue
    if not chosen:
        raise UserError(f"no image of {dataset.name} can be used; run: mmssl shards check")
    return torch.stack(images).to(model.device), _texts(model, dataset, chosen).to(model.device)


def _texts(model: Model, dataset: Dataset, samples: list[Sample]) -> Tensor:
    if all("txt" in sample.fields for sample in samples):
        return model.encode_text([image_captions(sample)[0] for sample in samples])
    names, labels = class_indices(dataset, samples)
    return class_weights(model, names, dataset_templates(dataset))[labels]
