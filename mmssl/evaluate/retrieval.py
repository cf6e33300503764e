"""Image-text retrieval in both directions, with any number of captions per image."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmssl.evaluate import metrics
from mmssl.evaluate.datasets import captions_of
from mmssl.evaluate.embed import Encoder, Pictures, Progress, embed_texts

RECALL_AT = (1, 5, 10)


@dataclass(frozen=True)
class Retrieval:
    """A model's search among the pictures and captions of a data set. N images, M captions."""

    metrics: dict[str, float]
    """`image_retrieval_recall@k` and `text_retrieval_recall@k` for each k up to the number of
    candidates, `image_retrieval_median_rank`, `text_retrieval_median_rank`, `samples` N and `captions` M."""
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
    encoder: Encoder, pictures: Pictures, *, batch_size: int = 256, progress: Progress | None = None
) -> Retrieval:
    """Search each caption's image among all images, and each image's captions among all captions.

    Raises:
        UserError: a sample has no caption.
    """
    captions = [captions_of(sample) for sample in pictures.samples]
    owner = torch.tensor([image for image, lines in enumerate(captions) for _ in lines])
    texts = [line for lines in captions for line in lines]
    return search(
        pictures.features, embed_texts(encoder, texts, batch_size=batch_size, progress=progress), owner, texts
    )


def search(
    images: Tensor,
    captions: Tensor,
    image_of_caption: Tensor,
    texts: Sequence[str],
    recall_at: Sequence[int] = RECALL_AT,
) -> Retrieval:
    """Judge normed features: images [N, D], captions [M, D], and the image of each caption, int64 [M]."""
    of_image = torch.arange(len(images))
    to_image = metrics.rank(
        captions, images, image_of_caption, of_image, [k for k in recall_at if k <= len(images)]
    )
    to_text = metrics.rank(
        images, captions, of_image, image_of_caption, [k for k in recall_at if k <= len(captions)]
    )
    figures: dict[str, float] = {}
    for word, found in (("image", to_image), ("text", to_text)):
        figures |= {f"{word}_retrieval_recall@{k}": metrics.share(hits) for k, hits in found.hits.items()}
        figures[f"{word}_retrieval_median_rank"] = metrics.median(found.ranks)
    figures |= {"samples": len(images), "captions": len(captions)}
    return Retrieval(figures, list(texts), captions, image_of_caption, to_image.ranks, to_text.ranks)
