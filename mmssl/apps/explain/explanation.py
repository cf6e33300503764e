"""Explanation of the similarity of an image and a caption: a map, scores of the words, the nearest training pairs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from mmssl.apps.explain.maps import DEFAULT, heat, image_maps
from mmssl.apps.search import Hit, exact_nearest, read_images
from mmssl.data import iter_samples
from mmssl.data.shards import BadSample
from mmssl.data.sources import expand
from mmssl.errors import UserError
from mmssl.evaluate import encode, labels
from mmssl.inference import ImageInput, Model
from mmssl.types import Sample


@dataclass(frozen=True)
class Explanation:
    """The contributions of places and words to the similarity of an image and a caption."""

    caption: str
    similarity: float
    """Cosine of their embeddings."""
    method: str
    """Name of the method that made the map."""
    image: Tensor
    """The model's input, uint8 [3, S, S]."""
    heat: Tensor
    """Places that match the caption, in 0..1, float32 [S, S]."""
    words: list[tuple[str, float]]
    """Each word, and the decrease of the similarity when it is left out."""


@dataclass(frozen=True, kw_only=True)
class Neighbour(Hit):
    """A pair of the shards."""

    image: bytes
    """The encoded image."""


def explain(model: Model, image: ImageInput, caption: str, method: str | None = None) -> Explanation:
    """Explain the similarity of an image and a caption.

    Args:
        method: a name in `mmssl.apps.explain.METHODS`. Default: `mmssl.apps.explain.DEFAULT`.

    Raises:
        UserError: the file is not an image, the caption is empty, or the tower does not support the method.
        DecodeError: an image that is not a file cannot be decoded.
    """
    if not caption.strip():
        raise UserError("the caption is empty; give the words to look for in the image")
    name = method or DEFAULT
    pixels = model.render(image)
    text_embedding = model.encode_text(caption)
    image_embedding = model.encode_image(pixels)
    maps = image_maps(model.encoder, pixels[None].to(model.device), text_embedding.to(model.device), name)
    return Explanation(
        caption=caption,
        similarity=float(image_embedding[0] @ text_embedding[0]),
        method=name,
        image=pixels,
        heat=heat(maps.cpu(), pixels.shape[-1])[0],
        words=word_scores(model, caption, image_embedding[0]),
    )


def word_scores(model: Model, caption: str, image: Tensor) -> list[tuple[str, float]]:
    """Each word, and the decrease of the similarity when it is left out; negative if the similarity rises.

    The scores are exact: the caption is encoded again without the word. Words with the same meaning share little.

    Args:
        image: the unit-length embedding of the image, [D].
    """
    words = caption.split()
    without = [" ".join(words[:place] + words[place + 1 :]) for place in range(len(words))]
    scores = model.encode_text([caption, *without]) @ image.cpu()
    return list(zip(words, (scores[0] - scores[1:]).tolist(), strict=True))


def nearest(
    model: Model,
    query: Tensor,
    shards: str | Sequence[str],
    by: Literal["image", "caption"] = "image",
    count: int = 6,
    progress: encode.Progress | None = None,
) -> list[Neighbour]:
    """The pairs whose images (or captions) are nearest to a unit-length embedding [D], the nearest first.

    All images (or captions) of the shards are encoded. The first line of a caption represents it. Samples with a blank
    caption are ignored.

    Raises:
        UserError: no shard matches, or no pair can be used.
    """
    names = expand(shards)
    if by == "image":
        encoded = encode.encode_images(model, _pairs(names), progress=progress)
        features, samples = encoded.features, encoded.samples
    else:
        samples = [replace(sample, image=b"") for sample in _pairs(names)]
        if not samples:
            raise UserError(f"no pair in {', '.join(names)}; give shards of images with captions")
        texts = [labels.image_captions(sample)[0] for sample in samples]
        features = encode.encode_texts(model, texts, progress=progress)
    rows, similarities = exact_nearest(query.cpu()[None].numpy(), [features.numpy()], count)
    chosen = [samples[row] for row in rows[0].tolist()]
    hits = [
        Hit(similarity, sample.shard, sample.key, labels.image_captions(sample)[0])
        for sample, similarity in zip(chosen, similarities[0].tolist(), strict=True)
    ]
    images = read_images(hits, remote=True)
    return [Neighbour(**vars(hit), image=image or b"") for hit, image in zip(hits, images, strict=True)]


def _pairs(shards: Sequence[str]) -> Iterator[Sample]:
    return (s for s in iter_samples(shards, on_bad=_ignore) if s.caption.strip())


def _ignore(bad: BadSample) -> None:
    """Ignore unreadable samples; `mmssl shards check` lists them."""
