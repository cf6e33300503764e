"""Samples that are held out from training: a pure function of each sample, whatever the order and the processes."""

from collections.abc import Sequence
from dataclasses import replace

from mmssl.config import HoldOutConfig
from mmssl.data.shards import ShardIndex
from mmssl.data.shards.shard_index import LeftOut, usable_groups
from mmssl.data.sources.values import iter_texts
from mmssl.data.transforms.render import group_number
from mmssl.errors import UserError
from mmssl.rng import torch_seed
from mmssl.types import Sample

_REASON = "it is not of this part"


def is_held_out(sample: Sample, rule: HoldOutConfig) -> bool:
    """True if a sample is held out: by a hash of its key, or of its value of the group's field."""
    grouped = rule.group is not None and sample.fields.get(rule.group) not in (None, "")
    owner = group_number(str(rule.group), sample, "") if grouped else sample.key
    return torch_seed("hold out", owner) >= (1 - rule.share) * 2**63


def hold_out(indexes: Sequence[ShardIndex], rule: HoldOutConfig) -> tuple[list[ShardIndex], list[ShardIndex]]:
    """Each local shard as two indexes: of the samples to train on, and of those held out.

    Raises:
        UserError: a shard changed or cannot be read, or no sample has the group's field.
    """
    parts = [_divide(index, rule) for index in indexes]
    if rule.group is not None and not any(rule.group in sample.fields for sample in iter_texts(indexes)):
        raise UserError(f"data.hold_out.group={rule.group!r} names a field that no sample has; name one of the .json")
    return [train for train, _ in parts], [held_out for _, held_out in parts]


def _divide(index: ShardIndex, rule: HoldOutConfig) -> tuple[ShardIndex, ShardIndex]:
    left_out = {out.ordinal for out in index.left_out}
    ordinals = [number for number in range(index.groups) if number not in left_out]
    # The keys alone are in the headers; a group is read from the members.
    samples = (
        iter_texts([index])
        if rule.group is not None
        else (Sample(0, index.shard, group.key, b"", {}) for group, _ in usable_groups(index))
    )
    marks = [
        (LeftOut(ordinal, sample.key, _REASON), is_held_out(sample, rule))
        for ordinal, sample in zip(ordinals, samples, strict=True)
    ]

    def without(held_out: bool) -> ShardIndex:
        outs = [*index.left_out, *(out for out, mark in marks if mark == held_out)]
        return replace(index, left_out=tuple(sorted(outs, key=lambda out: out.ordinal)))

    return without(True), without(False)
