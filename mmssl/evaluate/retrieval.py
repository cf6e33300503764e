"""Image-text retrieval in both directions, with any number of captions per image."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmssl.distributed import Processes
from mmssl.evaluate import metrics
from mmssl.evaluate.datasets import captions_of
from mmssl.evaluate.embed import ALONE, Encoder, Pictures, Progress, embed_texts
from mmssl.evaluate.interval import Interval, Rows, bootstrap
from mmssl.evaluate.metrics import Ranking

RECALL_AT = (1, 5, 10)


@dataclass(frozen=True)
class Retrieval:
    """A model's search among the pictures and captions of a data set. N images, M captions."""

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
    image_ranks: Tensor
    """For each caption, the rank of its image, [M]."""
    text_ranks: Tensor
    """For each image, the rank of its best caption, [N]."""


def evaluate(
    encoder: Encoder,
    pictures: Pictures,
    *,
    batch_size: int = 256,
    processes: Processes = ALONE,
    progress: Progress | None = None,
) -> Retrieval:
    """Search each caption's image among all images, and each image's captions among all captions.

    Raises:
        UserError: a sample has no caption.
    """
    captions = [captions_of(sample) for sample in pictures.samples]
    owner = torch.tensor([image for image, lines in enumerate(captions) for _ in lines])
    texts = [line for lines in captions for line in lines]
    features = embed_texts(encoder, texts, batch_size=batch_size, processes=processes, progress=progress)
    return search(pictures.features, features, owner, texts)


def search(
    images: Tensor,
    captions: Tensor,
    image_of_caption: Tensor,
    texts: Sequence[str],
    recall_at: Sequence[int] = RECALL_AT,
) -> Retrieval:
    """Judge normed features: images [N, D], captions [M, D], each caption's image (rising), int64 [M]."""
    own = torch.arange(len(images))
    to_image = metrics.rank(captions, images, image_of_caption, own, [k for k in recall_at if k <= len(images)])
    to_text = metrics.rank(images, captions, own, image_of_caption, [k for k in recall_at if k <= len(captions)])
    figures = _figures("image", to_image, slice(None)) | _figures("text", to_text, slice(None))
    rows_of = _RowsOfImages(torch.bincount(image_of_caption, minlength=len(images)).numpy())
    intervals = bootstrap(
        lambda rows: _figures("image", to_image, rows_of(rows)) | _figures("text", to_text, rows), len(images)
    )
    counts: dict[str, float] = {"samples": len(images), "captions": len(captions)}
    return Retrieval(
        figures | counts, intervals, list(texts), captions, image_of_caption, to_image.ranks, to_text.ranks
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


def _figures(word: str, found: Ranking, rows: Rows | slice) -> dict[str, float]:
    """The figures of one direction from a choice of its queries."""
    figures = {f"{word}_retrieval_recall@{k}": float(hits.numpy()[rows].mean()) for k, hits in found.hits.items()}
    figures[f"{word}_retrieval_map@{max(found.hits)}"] = float(found.average_precision.numpy()[rows].mean())
    figures[f"{word}_retrieval_median_rank"] = float(np.median(found.ranks.numpy()[rows]))
    return figures
