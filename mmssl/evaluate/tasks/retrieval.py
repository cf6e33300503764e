"""Image-text retrieval in both directions, with any number of captions per image."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmssl.evaluate import examples
from mmssl.evaluate.datasets import Dataset, sample_numbers
from mmssl.evaluate.labels import image_captions
from mmssl.evaluate.metrics import baselines, ranking
from mmssl.evaluate.metrics.baselines import Baselines
from mmssl.evaluate.metrics.ranking import Ranking
from mmssl.evaluate.task import Metrics, Task, TaskContext, list_baselines, list_intervals
from mmssl.files import write_csv
from mmssl.stats import Interval, Rows, bootstrap
from mmssl.types import Sample

RECALL_AT = (1, 5, 10)
NOTE = (
    "{repeated:,} of {captions:,} captions have the same words as a caption of another image: all images with these "
    "words count as right, so recalls are higher than where only the own image counts"
)


class Retrieval(Task):
    """Search images by captions and captions by images."""

    name = "retrieval"
    label = "image-text retrieval"
    description = "Search of images by captions and of captions by images."
    main_metrics = ("image_retrieval_recall@5", "text_retrieval_recall@5")
    paired = True

    def check(self, dataset: Dataset, sample: Sample) -> None:
        """A caption."""
        image_captions(sample)

    def run(self, context: TaskContext) -> Metrics:
        """Search each caption's image among all images, and each image's captions among all captions."""
        samples = context.images.samples
        of_image = torch.tensor(sample_numbers(samples))
        # The images of a sample share its captions.
        captions = [image_captions(samples[row]) for row in _firsts(of_image)]
        owner = torch.tensor([number for number, lines in enumerate(captions) for _ in lines])
        texts = [line for lines in captions for line in lines]
        features = context.encode_texts(texts)
        found = search(context.images.features, features, owner, same_words(texts), of_image)
        if context.folder is not None:
            _write_ranks(context.folder / "ranks.csv", samples, texts, (owner, of_image), found)
            if context.draw:
                examples.show_retrieval(context, texts, features, (owner, of_image))
        metrics: Metrics = found.metrics | list_intervals(found.intervals) | list_baselines(found.baselines)
        repeated = int(found.metrics.get("repeated_captions", 0))
        if repeated:
            metrics["note"] = NOTE.format(repeated=repeated, captions=len(texts))
        return metrics


@dataclass(frozen=True)
class RetrievalResult:
    """A model's search among N images and M captions of S samples."""

    metrics: dict[str, float]
    """`image_retrieval_X` (a caption looks for its image) and `text_retrieval_X` (an image looks for its
    captions) with X = `recall@k` for each k up to the number of candidates, `map@k` for the largest k, and
    `median_rank`; `samples` S and `captions` M, `images` N if a sample has several, and `repeated_captions`, those
    whose words another sample has too, if there are some."""
    intervals: dict[str, Interval]
    """95 % bootstrap intervals, over samples (drawn with all images and captions), among the same candidates."""
    baselines: Baselines
    """Recall -> `chance`, its expected value in a random order."""
    image_ranks: Ranking
    """Position and rank of the image of each caption, [M]."""
    text_ranks: Ranking
    """Positions and ranks of the captions of each image, [N]."""


def search(
    images: Tensor,
    captions: Tensor,
    sample_of_caption: Tensor,
    words: Tensor | None = None,
    sample_of_image: Tensor | None = None,
    recall_at: Sequence[int] = RECALL_AT,
) -> RetrievalResult:
    """Search with unit vectors: images [N, D], captions [M, D], each caption's sample from 0 (rising), int64 [M].

    Args:
        words: equal numbers for captions with the same words, int64 [M]: an image is right for the words of all its
            captions, and a caption for all images with its words. None: all captions differ.
        sample_of_image: each image's sample (rising), int64 [N]. None: each is a sample of its own.
    """
    own = torch.arange(len(images)) if sample_of_image is None else sample_of_image
    count = int(own[-1]) + 1
    repeated = 0 if words is None else _repeated(words, sample_of_caption)
    of_caption, of_image = (
        (sample_of_caption, own)
        if repeated == 0 or words is None
        else (words, _words_of_samples(words, sample_of_caption, count)[own])
    )
    to_image, to_text = (
        ranking.rank(queries, candidates, group, of, max(k for k in recall_at if k <= len(candidates)))
        for queries, candidates, group, of in (
            (captions, images, of_caption, of_image),
            (images, captions, of_image, of_caption),
        )
    )
    by_caption, by_image = _per_query("image", to_image, recall_at), _per_query("text", to_text, recall_at)
    caption_rows, image_rows = (
        _RowsOfSamples(torch.bincount(of, minlength=count).numpy()) for of in (sample_of_caption, own)
    )

    def measure(chosen: Rows) -> dict[str, float]:
        return _summarise(by_caption, caption_rows(chosen)) | _summarise(by_image, image_rows(chosen))

    counts: dict[str, float] = {"samples": count, "captions": len(captions)}
    counts |= {"images": len(images)} if len(images) > count else {}
    counts |= {"repeated_captions": repeated} if repeated else {}
    by_chance = {
        f"{word}_retrieval_recall@{k}": {"chance": baselines.recall_by_chance(found.right.numpy(), candidates, k)}
        for word, found, candidates in (("image", to_image, len(images)), ("text", to_text, len(captions)))
        for k in recall_at
        if k <= found.depth
    }
    found = measure(np.arange(count))
    fractions = {name: count for name in found if not name.endswith("median_rank")}
    intervals = bootstrap(measure, count, fractions=fractions)
    return RetrievalResult(found | counts, intervals, by_chance, to_image, to_text)


def same_words(captions: Sequence[str]) -> Tensor:
    """A number for each caption, equal for equal words: case and spaces do not count. int64 [M]."""
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(" ".join(text.casefold().split()), len(numbers)) for text in captions])


def _firsts(numbers: Tensor) -> list[int]:
    """The first row of each number of a rising sequence that counts from 0."""
    firsts: list[int] = torch.searchsorted(numbers, torch.arange(int(numbers[-1]) + 1)).tolist()
    return firsts


def _repeated(words: Tensor, sample_of_caption: Tensor) -> int:
    """The number of captions whose words another sample has too."""
    pairs = torch.unique(torch.stack([words, sample_of_caption]), dim=1)
    images_with = torch.bincount(pairs[0], minlength=int(words.max()) + 1)
    return int((images_with[words] > 1).sum())


def _words_of_samples(words: Tensor, sample_of_caption: Tensor, count: int) -> Tensor:
    """The words of each sample's captions, int64 [S, K], filled up with -1."""
    counts = torch.bincount(sample_of_caption, minlength=count)
    starts = counts.cumsum(0) - counts
    found = torch.full((count, int(counts.max())), -1)
    found[sample_of_caption, torch.arange(len(words)) - starts[sample_of_caption]] = words
    return found


class _RowsOfSamples:
    """Map from chosen samples to the rows of all their captions, or of all their images."""

    def __init__(self, counts: Rows) -> None:
        self.counts = counts
        self.starts = np.cumsum(counts) - counts

    def __call__(self, samples: Rows) -> Rows:
        counts = self.counts[samples]
        before = np.cumsum(counts) - counts
        rows: Rows = np.repeat(self.starts[samples] - before, counts) + np.arange(counts.sum())
        return rows


def _per_query(word: str, found: Ranking, recall_at: Sequence[int]) -> dict[str, NDArray[Any]]:
    """Metric of one direction -> its value for each query, [Q]."""
    values: dict[str, NDArray[Any]] = {
        f"{word}_retrieval_recall@{k}": found.hits(k).numpy() for k in recall_at if k <= found.depth
    }
    values[f"{word}_retrieval_map@{found.depth}"] = found.average_precision.numpy()
    return values | {f"{word}_retrieval_median_rank": found.ranks.numpy()}


def _summarise(values: Mapping[str, NDArray[Any]], rows: Rows) -> dict[str, float]:
    """The metrics of a choice of queries: means, and the median of the ranks."""
    return {
        name: float(np.median(column[rows]) if name.endswith("median_rank") else column[rows].mean())
        for name, column in values.items()
    }


def _write_ranks(
    path: Path,
    samples: Sequence[Sample],
    captions: Sequence[str],
    owners: tuple[Tensor, Tensor],
    found: RetrievalResult,
) -> None:
    """One row per image and one per caption: rank of the first right result (equal ones share the mean of their
    ranks), and its place among the best results (empty: not among them)."""
    images = ((sample, "text", "") for sample in samples)
    of_caption, of_image = owners
    firsts = [samples[row] for row in _firsts(of_image)]
    texts = ((firsts[number], "image", text) for number, text in zip(of_caption.tolist(), captions, strict=True))
    rows = (
        (sample.shard, sample.key, retrieval, text, rank, place or None)
        for queries, result in ((images, found.text_ranks), (texts, found.image_ranks))
        for (sample, retrieval, text), rank, place in zip(
            queries, result.ranks.tolist(), result.places.tolist(), strict=True
        )
    )
    write_csv(path, ("shard", "key", "retrieval", "caption", "rank", "place"), rows)
