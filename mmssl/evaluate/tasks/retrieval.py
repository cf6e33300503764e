"""Image-text retrieval in both directions, with any number of captions per image."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmssl.distributed import World
from mmssl.evaluate.encode import ALONE, EncodedImages, Encoder, Progress, encode_texts
from mmssl.evaluate.labels import image_captions
from mmssl.evaluate.metrics import ranking as metrics
from mmssl.evaluate.metrics.ranking import Ranking
from mmssl.stats import Interval, Rows, bootstrap

RECALL_AT = (1, 5, 10)


@dataclass(frozen=True)
class Retrieval:
    """A model's search among the images and captions of a data set. N images, M captions."""

    metrics: dict[str, float]
    """`image_retrieval_X` (a caption looks for its image) and `text_retrieval_X` (an image looks for its
    captions) with X = `recall@k` for each k up to the number of candidates, `map@k` for the largest k, and
    `median_rank`; `samples` N and `captions` M."""
    intervals: dict[str, Interval]
    """95 % bootstrap intervals, over images (an image's captions are drawn with it); the candidates stay."""
    captions: list[str]
    caption_features: Tensor
    """[M, D]."""
    image_of_caption: Tensor
    """int64 [M]."""
    image_ranks: Ranking
    """For each caption, the place and rank of its image, [M]."""
    text_ranks: Ranking
    """For each image, the places and ranks of its captions, [N]."""


def evaluate(
    encoder: Encoder,
    images: EncodedImages,
    *,
    batch_size: int = 256,
    world: World = ALONE,
    progress: Progress | None = None,
) -> Retrieval:
    """Search each caption's image among all images, and each image's captions among all captions.

    Raises:
        UserError: a sample has no caption.
    """
    captions = [image_captions(sample) for sample in images.samples]
    owner = torch.tensor([image for image, lines in enumerate(captions) for _ in lines])
    texts = [line for lines in captions for line in lines]
    features = encode_texts(encoder, texts, batch_size=batch_size, world=world, progress=progress)
    return search(images.features, features, owner, texts)


def search(
    images: Tensor,
    captions: Tensor,
    image_of_caption: Tensor,
    texts: Sequence[str],
    recall_at: Sequence[int] = RECALL_AT,
) -> Retrieval:
    """Judge normed features: images [N, D], captions [M, D], each caption's image (rising), int64 [M]."""
    own = torch.arange(len(images))
    to_image, to_text = (
        metrics.rank(queries, candidates, group, of, max(k for k in recall_at if k <= len(candidates)))
        for queries, candidates, group, of in (
            (captions, images, image_of_caption, own),
            (images, captions, own, image_of_caption),
        )
    )
    by_caption, by_image = _per_query("image", to_image, recall_at), _per_query("text", to_text, recall_at)
    rows_of = _RowsOfImages(torch.bincount(image_of_caption, minlength=len(images)).numpy())
    everything = np.arange(len(images))

    def figures(rows: Rows) -> dict[str, float]:
        return _figures(by_caption, rows_of(rows)) | _figures(by_image, rows)

    counts: dict[str, float] = {"samples": len(images), "captions": len(captions)}
    return Retrieval(
        figures(everything) | counts,
        bootstrap(figures, len(images)),
        list(texts),
        captions,
        image_of_caption,
        to_image,
        to_text,
    )


class _RowsOfImages:
    """From a choice of images to the rows of all their captions."""

    def __init__(self, counts: Rows) -> None:
        self.counts = counts
        self.starts = np.cumsum(counts) - counts

    def __call__(self, images: Rows) -> Rows:
        counts = self.counts[images]
        before = np.cumsum(counts) - counts
        rows: Rows = np.repeat(self.starts[images] - before, counts) + np.arange(counts.sum())
        return rows


def _per_query(word: str, found: Ranking, recall_at: Sequence[int]) -> dict[str, NDArray[Any]]:
    """Figure of one direction -> its value for each query, in the figure's order."""
    values: dict[str, NDArray[Any]] = {
        f"{word}_retrieval_recall@{k}": found.hits(k).numpy() for k in recall_at if k <= found.depth
    }
    values[f"{word}_retrieval_map@{found.depth}"] = found.average_precision.numpy()
    return values | {f"{word}_retrieval_median_rank": found.ranks.numpy()}


def _figures(values: Mapping[str, NDArray[Any]], rows: Rows) -> dict[str, float]:
    """The figures of a choice of queries: means, and the median of the ranks."""
    return {
        name: float(np.median(of_query[rows]) if name.endswith("median_rank") else of_query[rows].mean())
        for name, of_query in values.items()
    }
