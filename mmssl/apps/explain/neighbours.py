"""The training pairs nearest to an image or a caption."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from mmssl.data import expand, iter_samples
from mmssl.data.shards import BadSample
from mmssl.errors import UserError
from mmssl.evaluate.encode import encode_images, encode_texts
from mmssl.evaluate.labels import image_captions
from mmssl.inference import Model
from mmssl.types import Sample


@dataclass(frozen=True)
class Neighbour:
    """One pair of the shards."""

    shard: str
    key: str
    caption: str
    similarity: float
    image: bytes
    """The encoded image."""


def nearest(
    model: Model,
    query: Tensor,
    shards: str | Sequence[str],
    by: Literal["image", "caption"] = "image",
    count: int = 6,
) -> list[Neighbour]:
    """The pairs whose images (or captions) are nearest to a unit vector [D], the nearest first.

    The images (or captions) of all pairs of the shards are encoded; the first line of a caption stands for it, and
    samples whose caption is blank are no pairs.

    Raises:
        UserError: no shard matches, or no pair can be used.
    """
    places = expand(shards)
    if by == "image":
        embedded = encode_images(model, _pairs(places))
        features, samples = embedded.features, embedded.samples
    else:
        samples = [replace(sample, image=b"") for sample in _pairs(places)]
        if not samples:
            raise UserError(f"no pair in {', '.join(places)}; give shards of images with captions")
        features = encode_texts(model, [image_captions(sample)[0] for sample in samples])
    found = (features @ query.cpu()).topk(min(count, len(samples)))
    chosen = [samples[row].id for row in found.indices.tolist()]
    whole = {sample.id: sample for sample in _pairs(places) if sample.id in set(chosen)}
    return [
        Neighbour(s.shard, s.key, image_captions(s)[0], similarity, s.image)
        for s, similarity in zip((whole[i] for i in chosen), found.values.tolist(), strict=True)
    ]


def _pairs(shards: Sequence[str]) -> Iterator[Sample]:
    return (s for s in iter_samples(shards, on_bad=_left_out) if str(s.fields.get("txt", "")).strip())


def _left_out(bad: BadSample) -> None:
    """What cannot be read is nobody's neighbour; `mmssl shards check` names it."""
