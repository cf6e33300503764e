"""From encoded pictures and texts to features, in batches. Everything after this works on features alone."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from mmssl.data.reader import BadSample
from mmssl.types import Sample, UserError

Progress = Callable[[str, int], None]
"""Called with what is being done and how many are done."""


class Encoder(Protocol):
    """What is judged: two functions into one space. `mmssl.load` gives one; a few lines make one."""

    def encode_image(self, images: Sequence[bytes]) -> Tensor:
        """Encoded pictures (JPEG, PNG, ...) -> features [N, D]. ValueError or OSError: one is unreadable."""
        ...

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Texts -> features [N, D]."""
        ...


@dataclass(frozen=True)
class Pictures:
    """The pictures of a data set as features."""

    features: Tensor
    """L2-normed, float32 on the CPU, [N, D]."""
    samples: list[Sample]
    """The same rows as records, their image bytes dropped."""
    bad: list[BadSample]
    """Those that could not be encoded."""


def embed_pictures(
    encoder: Encoder, samples: Iterable[Sample], *, batch_size: int = 256, progress: Progress | None = None
) -> Pictures:
    """Encode every picture once, in order.

    A picture that cannot be decoded is left out and kept in `bad`.

    Raises:
        UserError: there is no sample, no picture of a batch can be encoded, or a feature is not finite.
    """
    features: list[Tensor] = []
    kept: list[Sample] = []
    bad: list[BadSample] = []
    for batch in _batches(samples, batch_size):
        usable, encoded = _encode(encoder, batch, bad)
        features.append(_normed(encoded, usable))
        kept.extend(replace(sample, image=b"") for sample in usable)
        if progress is not None:
            progress("pictures", len(kept))
    if not kept:
        raise UserError("there is no sample to evaluate; the shards are empty")
    return Pictures(torch.cat(features), kept, bad)


def embed_texts(
    encoder: Encoder, texts: Sequence[str], *, batch_size: int = 256, progress: Progress | None = None
) -> Tensor:
    """Encode every text, in order: L2-normed, float32 on the CPU, [N, D]."""
    features = []
    for start in range(0, len(texts), batch_size):
        with torch.no_grad():
            encoded = encoder.encode_text(texts[start : start + batch_size])
        features.append(F.normalize(encoded.float().cpu(), dim=-1))
        if progress is not None:
            progress("texts", min(start + batch_size, len(texts)))
    return torch.cat(features)


def _batches(samples: Iterable[Sample], size: int) -> Iterator[list[Sample]]:
    stream = iter(samples)
    while batch := list(islice(stream, size)):
        yield batch


def _encode(encoder: Encoder, batch: list[Sample], bad: list[BadSample]) -> tuple[list[Sample], Tensor]:
    """Encode a batch; when it fails, one by one, so that a broken picture is named and costs only itself."""
    with torch.no_grad():
        try:
            return batch, encoder.encode_image([sample.image for sample in batch])
        except (ValueError, OSError) as error:
            whole = error
        usable, features = [], []
        for sample in batch:
            try:
                features.append(encoder.encode_image([sample.image]))
                usable.append(sample)
            except (ValueError, OSError) as error:
                bad.append(BadSample(sample.shard, sample.key, str(error)))
    if not usable:
        raise UserError(f"no picture from {batch[0].shard}:{batch[0].key} on could be encoded: {whole}")
    return usable, torch.cat(features)


def _normed(features: Tensor, samples: list[Sample]) -> Tensor:
    features = F.normalize(features.float().cpu(), dim=-1)
    finite = features.isfinite().all(dim=1)
    if not bool(finite.all()):
        sample = samples[int((~finite).nonzero()[0])]
        raise UserError(
            f"the features of {sample.shard}:{sample.key} are not finite; the model's weights are broken"
        )
    return features
