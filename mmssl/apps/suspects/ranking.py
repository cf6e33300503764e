"""Samples in the order of suspicion that their caption or label is wrong, from embeddings alone."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt
from torch import Tensor

from mmssl.apps.search import Graph, exact_nearest
from mmssl.rng import generator

RIVALS = 1000
"""Most captions that a sample's own caption is compared with."""
GRAPH_FROM = 100_000
"""Samples from which on neighbours are looked up in a graph. Comparing all with all takes four times as long for twice
as many."""
_QUERIES, _ROWS = 1024, 16_384


@dataclass(frozen=True)
class Suspect:
    """The evidence about one sample."""

    row: int
    """Its place in the dataset."""
    suspicion: float
    """0 to 1: the mean of the fraction of better captions and, with labels, of neighbours with another label."""
    similarity: float
    """Cosine similarity of the image and its caption."""
    better_captions: float
    """Fraction of other captions that are more similar to the image than its own."""
    nearest: int
    """Place of the most similar other image."""
    neighbours_label: str | None
    """The most frequent label of the nearest images. None: there are no labels."""
    neighbours_agree: float | None
    """Fraction of the nearest images with the sample's label."""


def rank_samples(
    images: Tensor,
    texts: Tensor,
    captions: Sequence[str],
    labels: Sequence[str] | None = None,
    *,
    neighbours: int = 10,
    seed: int = 0,
    progress: Callable[[str, int], None] | None = None,
) -> list[Suspect]:
    """All samples, most suspicious first; between equals, those whose caption fits less.

    From `GRAPH_FROM` samples on the neighbours are found by a graph, if usearch is installed: it misses few of them.

    Args:
        images: unit vectors [N, D].
        texts: unit vectors [N, D] of their captions.
        neighbours: number of nearest images whose labels are compared.
        seed: draws the captions that a sample's own is compared with.
        progress: called with the name of the work and the number of items done.
    """
    own = (images * texts).sum(1)
    better = _better_captions(images, texts, own, captions, seed)
    suspects = []
    for row, near in enumerate(_nearest(images, neighbours)):
        if progress is not None and row % _QUERIES == 0:
            progress("images compared", row)
        votes = None if labels is None else Counter(labels[place] for place in near)
        label = None if votes is None or not votes else votes.most_common(1)[0][0]
        agree = None if votes is None or labels is None else votes[labels[row]] / max(1, votes.total())
        parts = [float(better[row]), *([] if agree is None else [1 - agree])]
        nearest = near[0] if near else row
        suspicion = sum(parts) / len(parts)
        suspects.append(Suspect(row, suspicion, float(own[row]), float(better[row]), nearest, label, agree))
    return sorted(suspects, key=lambda suspect: (-suspect.suspicion, suspect.similarity, suspect.row))


def _better_captions(
    images: Tensor, texts: Tensor, own: Tensor, captions: Sequence[str], seed: int
) -> npt.NDArray[np.float64]:
    """For each image, the fraction of drawn captions that fit it better than its own; equal captions do not count."""
    first = {caption: row for row, caption in reversed(list(enumerate(captions)))}
    rivals = np.array(sorted(first.values()), dtype=np.int64)
    if len(rivals) > RIVALS:
        rivals = np.sort(generator(seed, "rivals").choice(rivals, RIVALS, replace=False))
    place = {captions[row]: number for number, row in enumerate(rivals.tolist())}
    others = texts[rivals]
    found = np.zeros(len(images))
    for start in range(0, len(images), _QUERIES):
        part = slice(start, start + _QUERIES)
        wins = (images[part] @ others.T > own[part, None]).numpy()
        for row, caption in enumerate(captions[part]):
            if (same := place.get(caption)) is not None:
                wins[row, same] = False
        count = np.array([len(rivals) - (caption in place) for caption in captions[part]])
        found[part] = wins.sum(1) / np.maximum(1, count)
    return found


def _nearest(images: Tensor, count: int) -> Iterator[list[int]]:
    """For each image, the places of its nearest other images, nearest first."""
    rows = images.numpy()
    parts = [rows[start : start + _ROWS] for start in range(0, len(rows), _ROWS)]
    with TemporaryDirectory(prefix="mmssl-suspects-") as folder:
        graph = None
        if len(rows) >= GRAPH_FROM and find_spec("usearch") is not None:
            graph = Graph.build(parts, rows.shape[1], Path(folder) / "graph.usearch")
        for start in range(0, len(rows), _QUERIES):
            queries = rows[start : start + _QUERIES]
            found = exact_nearest(queries, parts, count + 1) if graph is None else graph.nearest(queries, count + 1)
            for row, near in enumerate(found[0].tolist(), start=start):
                yield [place for place in near if place != row][:count]
