"""A dataset as a model sees it: sampled images and the texts they are compared with."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mmssl.apps.report.run_reader import RunRecord, read_table
from mmssl.apps.report.thumbnails import thumbnail
from mmssl.apps.report.wording import brief
from mmssl.data.transforms import DecodeError, Pixels
from mmssl.evaluate import datasets, encode, labels, open_dataset
from mmssl.inference import Model
from mmssl.types import Sample


@dataclass(frozen=True)
class EncodedSamples:
    """N images and M texts."""

    dataset: datasets.Dataset
    samples: list[Sample]
    features: Tensor
    """[N, D]."""
    small: list[Pixels]
    texts: list[str]
    weights: Tensor
    """Unit-length embeddings of the texts, [M, D]."""
    owner: Tensor
    """Index of the (first) matching text of each image, int64 [N]."""
    classified: bool
    """True if the texts are classes."""

    @property
    def scores(self) -> Tensor:
        """Similarities, [N, M]."""
        return self.features @ self.weights.T

    def name(self, text: int) -> str:
        """A text as the page shows it."""
        return brief(self.texts[text])

    def right(self, row: int, text: int) -> bool:
        """True if a text belongs to the image or equals one that does."""
        return self.texts[text] == self.texts[int(self.owner[row])]

    def pixels(self, model: Model, rows: Sequence[int]) -> dict[int, Tensor]:
        """The images of some rows as the model sees them, uint8 [3, S, S]."""
        wanted = {self.samples[row].id: row for row in rows}
        return {wanted[s.id]: model.view(s.image) for s in datasets.read(self.dataset) if s.id in wanted}


def open_evaluated_dataset(run: RunRecord, key: str) -> datasets.Dataset | None:
    """The dataset of `DATASET/TASK`, found by the shards that the evaluation's tables name; None without tables."""
    name = key.rsplit("/", 1)[0]
    for table in ("predictions.csv", "ranks.csv"):
        shards = list(dict.fromkeys(row["shard"] for row in read_table(run.tables[key] / table)))
        if shards:
            configured = run.config.evaluate.suites.get(name) if run.config is not None else None
            if configured is not None and Path(configured.data).is_dir():
                return open_dataset(configured.data, name=name)
            return open_dataset(shards, name=name)
    return None


def encode_sample(model: Model, dataset: datasets.Dataset, limit: int, captioned: bool) -> EncodedSamples:
    """Encode up to `limit` evenly spaced images of a dataset, and their captions or the class names.

    Raises:
        UserError: no image can be used, or a sample has no caption or label.
    """
    count = sum(1 for _ in datasets.read(dataset))
    step = max(1, -(-count // limit))
    small: dict[int, Pixels] = {}

    def drawn() -> Iterator[Sample]:
        for place, sample in enumerate(datasets.read(dataset)):
            if place % step:
                continue
            try:
                small[sample.id] = thumbnail(sample.image)
            except DecodeError:
                continue
            yield sample

    embedded = encode.encode_images(model, drawn())
    samples = embedded.samples
    if captioned:
        texts = [labels.image_captions(sample)[0] for sample in samples]
        weights, owner = encode.encode_texts(model, texts), torch.arange(len(samples))
    else:
        names, owner = labels.class_indices(dataset, samples)
        texts, weights = list(names), encode.class_weights(model, names, datasets.class_templates(dataset))
    shown = [small[sample.id] for sample in samples]
    return EncodedSamples(dataset, samples, embedded.features, shown, texts, weights, owner, not captioned)
