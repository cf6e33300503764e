"""Facts about every sample of local shards, by its number: its key, and a number for its caption or a field of it."""

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from mmssl.data.shards import ShardIndex
from mmssl.data.shards.samples import SampleError, read_fields
from mmssl.data.shards.shard_index import usable_groups
from mmssl.data.shards.tar import ReadAt
from mmssl.data.transforms import captions
from mmssl.data.transforms.render import group_number
from mmssl.errors import UserError
from mmssl.rng import torch_seed
from mmssl.types import Sample

Ints = NDArray[np.int64]


def sample_keys(index: ShardIndex) -> list[str]:
    """The keys of a shard's usable samples, in order.

    Raises:
        UserError: the shard changed or cannot be read.
    """
    return [group.key for group, _ in usable_groups(index)]


def distinct_values(indexes: Sequence[ShardIndex], field: str, templates: Sequence[str]) -> Ints:
    """A number for each usable sample of shards, equal for equal values of a field, int64 [N].

    `caption` stands for the caption of the first template, without its random choices: the first of several captions,
    and all tags. A sample without a value, or that cannot be used, has a number of its own.

    Raises:
        UserError: a shard changed or cannot be read, or no sample has the field.
    """
    found, known, has_field = [], set[str](), field == captions.CAPTION_GROUP
    for number, sample in enumerate(iter_texts(indexes)):
        has_field = has_field or field in sample.fields
        known |= set() if has_field else sample.fields.keys()
        found.append(_value(number, sample, field, templates))
    if not has_field:
        names = ", ".join(sorted(known - {"txt"})) or "none"
        raise UserError(f"data.batching.distinct={field!r} names a field that no sample has; use caption or: {names}")
    return np.array(found, dtype=np.int64)


def iter_texts(indexes: Sequence[ShardIndex]) -> Iterator[Sample]:
    """Each usable sample without its images; without fields if it cannot be used."""
    number = 0
    for index in indexes:
        for group, read in usable_groups(index):
            try:
                fields = read_fields(group, partial(_between, read))
            except SampleError:
                fields = {}
            yield Sample(number, index.shard, group.key, b"", fields)
            number += 1


def _between(read: ReadAt, start: int, stop: int) -> bytes:
    return read(start, stop - start)


def _value(number: int, sample: Sample, field: str, templates: Sequence[str]) -> int:
    """The number of a sample's value."""
    if field != captions.CAPTION_GROUP:
        return group_number(field, sample, "")
    try:
        return group_number(field, sample, captions.render_caption(sample.fields, templates[:1], None))
    except UserError:
        # Training replaces this sample and counts it as bad.
        return torch_seed("sample", number)
