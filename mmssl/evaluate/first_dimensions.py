"""Evaluation of the first dimensions of embeddings (Matryoshka), from features that are computed once."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor
from torch.nn import functional as F

from mmssl.errors import UserError
from mmssl.evaluate.encode import EncodedImages, Encoder
from mmssl.evaluate.task import TaskContext
from mmssl.types import Sample


def dimension_key(key: str, dim: int) -> str:
    """The name of an evaluation of the first `dim` dimensions."""
    return f"{key}@{dim}"


def shorten_context(
    context: TaskContext, dim: int, folder: Path | None, texts: dict[tuple[str, ...], Tensor]
) -> TaskContext:
    """The same evaluation on the first `dim` dimensions of all features, normalised again.

    Args:
        texts: features of texts that were encoded already; further ones are added.

    Raises:
        UserError: the features have fewer dimensions.
    """
    width = context.images.features.shape[1]
    if not 1 <= dim <= width:
        raise UserError(f"--dims {dim}: the embeddings of this model have {width} dimensions; give 1 to {width}")
    training, variant = context.training_images, context.encode_variant

    def encode_variant(encoder: Encoder, samples: Iterable[Sample], name: str) -> EncodedImages:
        return _cut(variant(encoder, samples, name), dim)

    return replace(
        context,
        images=_cut(context.images, dim),
        training_images=lambda: _cut(training(), dim),
        encode_variant=encode_variant,
        text_encoder=_FirstDimensions(context.encoder, dim, texts),
        folder=folder,
    )


def _cut(images: EncodedImages, dim: int) -> EncodedImages:
    return replace(images, features=F.normalize(images.features[:, :dim], dim=-1))


class _FirstDimensions:
    """The first dimensions of an encoder's texts, each batch encoded once for all numbers of dimensions."""

    def __init__(self, encoder: Encoder, dim: int, known: dict[tuple[str, ...], Tensor]) -> None:
        self.encode_image: Callable[[Sequence[bytes]], Tensor] = encoder.encode_image
        self._encoder, self._dim, self._known = encoder, dim, known

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        key = tuple(texts)
        if key not in self._known:
            self._known[key] = self._encoder.encode_text(texts).float().cpu()
        return self._known[key][:, : self._dim]
