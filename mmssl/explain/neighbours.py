"""The training pairs nearest to a picture or a caption."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from mmssl.data.patterns import expand
from mmssl.data.reader import iter_samples
from mmssl.data.sample import BadSample
from mmssl.evaluate.datasets import captions_of
from mmssl.evaluate.embed import embed_pictures, embed_texts
from mmssl.model import Model


@dataclass(frozen=True)
class Neighbour:
    """One pair of the shards."""

    shard: str
    key: str
    caption: str
    similarity: float
    image: bytes
    """The encoded picture."""


def nearest(
    model: Model,
    query: Tensor,
    shards: str | Sequence[str],
    by: Literal["picture", "caption"] = "picture",
    count: int = 6,
) -> list[Neighbour]:
    """The pairs whose pictures (or captions) are nearest to a unit vector [D], the nearest first.

    Every pair of the shards is encoded; the first line of its caption stands for it.

    Raises:
        UserError: no shard matches, or no pair can be used.
    """
    places = expand(shards)
    embedded = embed_pictures(model, iter_samples(places, on_bad=_left_out))
    features, samples = embedded.features, embedded.samples
    if by == "caption":
        features = embed_texts(model, [captions_of(sample)[0] for sample in samples])
    found = (features @ query.cpu()).topk(min(count, len(samples)))
    chosen = {samples[row].id: place for place, row in enumerate(found.indices.tolist())}
    pictures = {s.id: s for s in iter_samples(places, on_bad=_left_out) if s.id in chosen}
    return [
        Neighbour(s.shard, s.key, captions_of(s)[0], similarity, s.image)
        for s, similarity in zip((pictures[i] for i in chosen), found.values.tolist(), strict=True)
    ]


def _left_out(bad: BadSample) -> None:
    """What cannot be read is nobody's neighbour; `mmssl shards check` names it."""
