"""From encoded pictures and texts to features, in batches. Everything after this works on features alone.

Over several processes every rank reads all records, encodes every world-th batch, and ends with all features.
The batches are those of one process, so the features are equal to the last bit.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from mmssl.data.sample import BadSample
from mmssl.distributed import Processes
from mmssl.types import Sample, UserError

T = TypeVar("T")
Progress = Callable[[str, int], None]
"""Called with what is being done and how many are done."""
ALONE = Processes()
"""One process."""


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


@dataclass
class _Part:
    """What one rank encoded."""

    places: list[int] = field(default_factory=list)
    """Where its rows stand among all."""
    rows: list[Tensor] = field(default_factory=list)
    """Normed features, [n, D] a batch."""
    bad: list[BadSample] = field(default_factory=list)


def embed_pictures(
    encoder: Encoder,
    samples: Iterable[Sample],
    *,
    batch_size: int = 256,
    processes: Processes = ALONE,
    progress: Progress | None = None,
) -> Pictures:
    """Encode every picture once, in order. Every rank passes the same samples and gets the same features.

    A picture that cannot be decoded is left out and kept in `bad`.

    Raises:
        UserError: there is no sample, no picture of a batch can be encoded, or a feature is not finite.
    """
    records: list[Sample] = []
    part = _Part()
    problem = None
    try:
        for number, batch in enumerate(_batches(samples, batch_size)):
            if number % processes.world == processes.rank:
                _encode(encoder, batch, len(records), part)
            records.extend(replace(sample, image=b"") for sample in batch)
            if progress is not None:
                progress("pictures", len(records))
        if not records:
            raise UserError("there is no sample to evaluate; the shards are empty")
    except UserError as error:
        # Told to all ranks below: one that stopped alone would leave the others waiting.
        problem = str(error)
    problems = _from_all(processes, problem)
    if any(p is not None for p in problems):
        raise UserError(next(p for p in problems if p is not None))
    features, known = _join(processes, part, len(records))
    bad = [BadSample(*entry) for entries in _from_all(processes, _as_lists(part.bad)) for entry in entries]
    return Pictures(features[known], [s for s, there in zip(records, known.tolist(), strict=True) if there], bad)


def embed_texts(
    encoder: Encoder,
    texts: Sequence[str],
    *,
    batch_size: int = 256,
    processes: Processes = ALONE,
    progress: Progress | None = None,
) -> Tensor:
    """Encode every text, in order: L2-normed, float32 on the CPU, [N, D], N >= 1. Every rank gets all."""
    part = _Part()
    for number, start in enumerate(range(0, len(texts), batch_size)):
        stop = min(start + batch_size, len(texts))
        if number % processes.world == processes.rank:
            with torch.no_grad():
                part.rows.append(F.normalize(encoder.encode_text(texts[start:stop]).float().cpu(), dim=-1))
            part.places.extend(range(start, stop))
        if progress is not None:
            progress("texts", stop)
    return _join(processes, part, len(texts))[0]


def _batches(samples: Iterable[Sample], size: int) -> Iterator[list[Sample]]:
    stream = iter(samples)
    while batch := list(islice(stream, size)):
        yield batch


def _encode(encoder: Encoder, batch: list[Sample], start: int, part: _Part) -> None:
    """Encode a batch; when it fails, one by one, so that a broken picture is named and costs only itself."""
    with torch.no_grad():
        try:
            encoded = encoder.encode_image([sample.image for sample in batch])
            usable = list(range(len(batch)))
        except (ValueError, OSError) as error:
            usable, encoded = _one_by_one(encoder, batch, part.bad, error)
    features = F.normalize(encoded.float().cpu(), dim=-1)
    finite = features.isfinite().all(dim=1)
    if not bool(finite.all()):
        sample = batch[usable[int((~finite).nonzero()[0])]]
        raise UserError(f"the features of {sample.shard}:{sample.key} are not finite; the model's weights are broken")
    part.rows.append(features)
    part.places.extend(start + index for index in usable)


def _one_by_one(
    encoder: Encoder, batch: list[Sample], bad: list[BadSample], whole: Exception
) -> tuple[list[int], Tensor]:
    usable, features = [], []
    for index, sample in enumerate(batch):
        try:
            features.append(encoder.encode_image([sample.image]))
            usable.append(index)
        except (ValueError, OSError) as error:
            bad.append(BadSample(sample.shard, sample.key, str(error)))
    if not usable:
        raise UserError(f"no picture from {batch[0].shard}:{batch[0].key} on could be encoded: {whole}")
    return usable, torch.cat(features)


def _join(processes: Processes, part: _Part, total: int) -> tuple[Tensor, Tensor]:
    """All ranks' rows in their places [total, D], and which places have one, bool [total]."""
    # The first batch is rank 0's, so it knows the width.
    width = processes.broadcast(part.rows[0].shape[1] if part.rows else 0)
    rows, known = torch.zeros(total, width), torch.zeros(total)
    if part.rows:
        rows[part.places] = torch.cat(part.rows)
        known[part.places] = 1
    # Adding the zeros of the other ranks changes no bit.
    return processes.sum(rows), processes.sum(known) > 0


def _from_all(processes: Processes, value: T) -> list[T]:
    """The values of all ranks, in rank order."""
    return [processes.broadcast(value, source) for source in range(processes.world)]


def _as_lists(bad: Sequence[BadSample]) -> list[list[str]]:
    return [[b.shard, b.key, b.error] for b in bad]
