"""What smaller stored embeddings cost: recall of the neighbours that full ones have."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mmssl.apps.search import Embeddings, exact_nearest
from mmssl.data import iter_samples
from mmssl.errors import UserError
from mmssl.evaluate import encode
from mmssl.inference import Model, stored

NEIGHBOURS = 10
QUERIES = 2000
Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Recall:
    """One way to store embeddings."""

    name: str
    bytes_per_image: int
    images: float
    """Fraction of the 10 nearest images to an image that it finds."""
    texts: float
    """The same of the nearest to a caption."""

    def text(self) -> str:
        """As a line of a table."""
        return f"{self.name:24} {self.bytes_per_image:6,} {self.images:8.3f} {self.texts:8.3f}"


def bench_storage(model: Model, shards: Sequence[str], dims: Sequence[int]) -> list[Recall]:
    """Recall of the 10 nearest among float32 embeddings, for images and captions of the shards as queries.

    Args:
        dims: first dimensions to measure too.

    Raises:
        UserError: the shards have no image with a caption, or too few.
    """
    found = encode.encode_images(model, iter_samples(shards, on_bad=lambda bad: None), batch_size=256)
    if len(found.samples) <= NEIGHBOURS:
        raise UserError(f"the shards hold {len(found.samples)} images with captions; recall needs more")
    images: Vectors = found.features.numpy()
    rows = np.linspace(0, len(images) - 1, min(QUERIES, len(images))).astype(np.int64)
    texts: Vectors = model.encode_text([found.samples[row].caption for row in rows.tolist()]).numpy()
    queries, full = (images[rows], texts), images.shape[1]
    truth = [exact_nearest(query, [images], NEIGHBOURS)[0] for query in queries]
    measured = []
    for dim in (full, *dims):
        short, cut = _prefix(images, dim), [_prefix(query, dim) for query in queries]
        kinds: dict[str, Embeddings] = {"float32": short}
        kinds |= {dtype: stored.rounded(short, dtype) for dtype in ("float16", "int8")}
        for name, part in kinds.items():
            recalls = [_recall(exact_nearest(q, [part], NEIGHBOURS)[0], t) for q, t in zip(cut, truth, strict=True)]
            measured.append(Recall(f"{name}, {dim} dimensions", part[0].nbytes, *recalls))
    return measured


def _prefix(vectors: Vectors, dim: int) -> Vectors:
    found: Vectors = vectors[:, :dim] / np.linalg.norm(vectors[:, :dim], axis=1, keepdims=True)
    return found


def _recall(found: npt.NDArray[np.int64], truth: npt.NDArray[np.int64]) -> float:
    shared = sum(len(set(a) & set(b)) for a, b in zip(found.tolist(), truth.tolist(), strict=True))
    return shared / truth.size
