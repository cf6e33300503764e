"""Samples that are held out from training: a pure function of each sample, whatever the order and the processes."""

import hashlib
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmssl.config import HoldOutConfig
from mmssl.data.shards import ShardIndex
from mmssl.data.shards.shard_index import LeftOut
from mmssl.data.sources.values import iter_texts, sample_keys
from mmssl.data.transforms.render import group_number
from mmssl.errors import UserError
from mmssl.files import atomic_write
from mmssl.rng import torch_seed
from mmssl.types import Sample

_REASON = "it is not of this part"
_DIGEST = 16
_log = logging.getLogger(__name__)

Numbers = NDArray[np.uint64]


def is_held_out(sample: Sample, rule: HoldOutConfig) -> bool:
    """True if a sample is held out: by a hash of its key, or of its value of the group's field."""
    return _number(sample, rule.group) >= _least(rule)


def hold_out(indexes: Sequence[ShardIndex], rule: HoldOutConfig) -> tuple[list[ShardIndex], list[ShardIndex]]:
    """Each local shard as two indexes: of the samples to train on, and of those held out.

    Raises:
        UserError: a shard changed or cannot be read, or no sample has the group's field.
    """
    parts = [_divide(index, rule) for index in indexes]
    if rule.group is not None and not any(rule.group in sample.fields for sample in iter_texts(indexes)):
        raise UserError(f"data.hold_out.group={rule.group!r} names a field that no sample has; name one of the .json")
    return [train for train, _ in parts], [held_out for _, held_out in parts]


def _number(sample: Sample, group: str | None) -> int:
    """The hash, below 2 ** 63."""
    grouped = group is not None and sample.fields.get(group) not in (None, "")
    return torch_seed("hold out", group_number(str(group), sample, "") if grouped else sample.key)


def _least(rule: HoldOutConfig) -> int:
    """The least number of a sample that is held out."""
    return math.ceil((1 - rule.share) * 2**63)


def _divide(index: ShardIndex, rule: HoldOutConfig) -> tuple[ShardIndex, ShardIndex]:
    usable = np.ones(index.groups, dtype=bool)
    usable[[out.ordinal for out in index.left_out]] = False
    ordinals, held_out = np.flatnonzero(usable), _read_numbers(index, rule.group) >= np.uint64(_least(rule))

    def without(rows: NDArray[np.int64]) -> ShardIndex:
        outs = [*index.left_out, *(LeftOut(ordinal, "", _REASON) for ordinal in rows.tolist())]
        return replace(index, left_out=tuple(sorted(outs, key=lambda out: out.ordinal)))

    return without(ordinals[held_out]), without(ordinals[~held_out])


def _read_numbers(index: ShardIndex, group: str | None) -> Numbers:
    """The numbers of a shard's usable samples, uint64 [samples].

    They are read from NAME.tar.hashes beside the shard, where the first call stores them: finding them means to read
    all headers for the keys, and all texts for a group.

    Raises:
        UserError: the shard changed or cannot be read.
    """
    path = Path(f"{index.shard}.hashes")
    source = index.checksum, index.bytes, index.mtime_ns, [out.ordinal for out in index.left_out], group
    try:
        stored = path.read_bytes()
    except OSError:
        stored = b""
    if len(stored) == _DIGEST + 8 * index.samples and stored[:_DIGEST] == _digest(source, stored[_DIGEST:]):
        return np.frombuffer(stored, dtype="<u8", offset=_DIGEST)
    numbers = (
        (torch_seed("hold out", key) for key in sample_keys(index))
        if group is None
        else (_number(sample, group) for sample in iter_texts([index]))
    )
    content = np.fromiter(numbers, dtype="<u8", count=index.samples)
    try:
        atomic_write(path, _digest(source, content.tobytes()) + content.tobytes())
    except OSError as error:
        _log.info("%s cannot be written (%s): the hashes are computed at each start", path, error.strerror)
    return content


def _digest(source: tuple[object, ...], content: bytes) -> bytes:
    """Of what the numbers were found in, and of the numbers."""
    return hashlib.blake2b(repr(source).encode() + content, digest_size=_DIGEST).digest()
