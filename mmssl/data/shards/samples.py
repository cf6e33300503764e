"""The samples of groups: their members parsed into an image and fields."""

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmssl.data.shards.groups import Group, groups
from mmssl.data.shards.headers import TarError
from mmssl.data.shards.members import MAPPED_CAPTION, MASKS, SampleLimits
from mmssl.data.shards.tar import Archive, Member
from mmssl.types import CAPTION_FIELDS, Sample

LONGEST_LABELS = 1 << 16
"""Bytes of a `.npy` that is read. Other arrays, such as embeddings, are mostly larger."""


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be used."""

    shard: str
    key: str
    error: str


class SampleError(ValueError):
    """The bytes of a sample do not match the index, or a member cannot be parsed."""

    def __init__(self, message: str, key: str | None = None) -> None:
        super().__init__(message)
        self.key = key


def parse_sample(number: int, shard: str, content: bytes, limits: SampleLimits, need_text: bool = True) -> Sample:
    """The sample whose tar members fill `content`.

    Raises:
        SampleError: `content` has no usable sample.
    """
    archive = Archive(lambda offset, count: content[offset : offset + count], len(content))
    try:
        group = next(groups(archive, limits, need_text), None)
    except TarError as error:
        raise SampleError(f"{error} of the sample; the shard changed since it was indexed") from None
    if group is None or group.defect is not None:
        reason = "no members" if group is None else group.defect
        raise SampleError(f"{reason}; the shard changed since it was indexed")
    try:
        return group_sample(number, shard, group, content)
    except SampleError as error:
        raise SampleError(str(error), group.key) from None


def group_sample(number: int, shard: str, group: Group, content: bytes) -> Sample:
    """The sample of a group; `content` begins at the group's first header.

    Raises:
        SampleError: a member is cut or cannot be parsed.
    """
    return read_sample(number, shard, group, lambda start, stop: content[start - group.start : stop - group.start])


def read_sample(number: int, shard: str, group: Group, read: Callable[[int, int], bytes]) -> Sample:
    """The sample of a group, whose bytes [start, stop) of the shard `read` returns.

    Raises:
        SampleError: a member is cut or cannot be parsed.
    """
    fields = read_fields(group, read)
    image, *more = [_bytes_of(member, read) for member in group.images()] or [b""]
    masks = (group.members[name] for name in MASKS if name in group.members)
    return Sample(number, shard, group.key, image, fields, tuple(more), next((_bytes_of(m, read) for m in masks), b""))


def read_fields(group: Group, read: Callable[[int, int], bytes]) -> dict[str, Any]:
    """The fields of a sample: those of its .json, its caption and its label.

    Raises:
        SampleError: a member is cut or cannot be parsed.
    """
    fields: dict[str, Any] = {}
    if "json" in group.members:
        fields.update(_parse_json(_bytes_of(group.members["json"], read)))
    if "cls" in group.members:
        fields["cls"] = _label(_decode(_bytes_of(group.members["cls"], read), "cls"))
    extension = "caption" if MAPPED_CAPTION in group.members else "txt"
    texts = [_decode(_bytes_of(member, read), extension) for member in group.texts()]
    if len(texts) == 1:
        fields["txt"] = texts[0]
    elif texts:
        texts = [text for text in texts if text.strip()] or texts[:1]
        fields |= {"txt": texts[0], "captions": texts}
    if "npy" in group.members and "labels" not in fields:
        labels = multi_hot_labels(_bytes_of(group.members["npy"], read))
        fields |= {} if labels is None else {"labels": labels}
    if not isinstance(fields.get("txt"), str):
        fields |= _caption_in(fields)
    return fields


def _caption_in(fields: Mapping[str, Any]) -> dict[str, Any]:
    """`txt` by the first usual field of the .json that holds a text, or several captions in a list. Empty: none does.

    The list is returned too, without what is empty, as it must begin with `txt`.
    """
    blank: dict[str, Any] = {}
    for name in CAPTION_FIELDS:
        value = fields.get(name)
        if isinstance(value, list) and all(item is None or isinstance(item, str) for item in value):
            texts = [item for item in value if item is not None and item.strip()]
            if texts:
                return {"txt": texts[0], name if name != "txt" else "captions": texts}
        elif isinstance(value, str):
            if value.strip():
                return {"txt": value}
            blank = blank or {"txt": value}
    return blank


def _bytes_of(member: Member, read: Callable[[int, int], bytes]) -> bytes:
    found = read(member.data, member.end)
    if len(found) < member.end - member.data:
        raise SampleError(f"{member.name!r} is cut")
    return found[: member.size]


def _decode(content: bytes, extension: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SampleError(f".{extension} is not UTF-8 (byte {error.start})") from None


def _parse_json(content: bytes) -> dict[str, Any]:
    try:
        tree = json.loads(_decode(content, "json"))
    except RecursionError:
        raise SampleError(".json is nested too deeply") from None
    except ValueError as error:
        raise error if isinstance(error, SampleError) else SampleError(f".json is damaged: {error}") from None
    if not isinstance(tree, dict):
        raise SampleError(f".json holds a {type(tree).__name__} instead of an object")
    return tree


def _label(text: str) -> int | str:
    """A class number as int; other labels as text."""
    label = text.strip()
    return int(label) if label.removeprefix("-").isdecimal() and len(label) < 19 else label


def multi_hot_labels(content: bytes) -> list[int] | None:
    """The classes with a 1 in a `.npy` of CLIP_benchmark's multi-label datasets; None if it is another array.

    Nothing in it is run: arrays of objects are refused by NumPy.
    """
    if len(content) > LONGEST_LABELS:
        return None
    try:
        array = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except (ValueError, TypeError, SyntaxError, EOFError, OverflowError, MemoryError, RecursionError):
        return None
    if array.ndim != 1 or array.dtype.kind not in "biuf" or not np.isin(array, (0, 1)).all():
        return None
    found: list[int] = array.nonzero()[0].tolist()
    return found
