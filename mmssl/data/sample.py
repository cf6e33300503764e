"""From the bytes of a sample's members to the sample."""

import json
from dataclasses import dataclass
from typing import Any

from mmssl.data.grouping import Group, Limits, groups
from mmssl.data.tar import Archive, Member, TarError
from mmssl.types import Sample


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be used."""

    shard: str
    key: str
    error: str


class SampleError(ValueError):
    """The bytes of a sample are not what the index promised, or a member cannot be parsed."""

    def __init__(self, message: str, key: str | None = None) -> None:
        super().__init__(message)
        self.key = key


def parse_sample(number: int, shard: str, content: bytes, limits: Limits, need_text: bool = True) -> Sample:
    """The sample whose tar members fill `content`.

    Raises:
        SampleError: it holds no usable sample.
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
    image = group.image()
    assert image is not None

    def bytes_of(member: Member) -> bytes:
        begin = member.data - group.start
        if begin + member.size > len(content):
            raise SampleError(f"{member.name!r} is cut")
        return content[begin : begin + member.size]

    fields: dict[str, Any] = {}
    if "json" in group.members:
        fields.update(_parse_json(bytes_of(group.members["json"])))
    for extension in ("txt", "cls"):
        if extension in group.members:
            text = _decode(bytes_of(group.members[extension]), extension)
            fields[extension] = _label(text) if extension == "cls" else text
    return Sample(number, shard, group.key, bytes_of(image), fields)


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
    """A class number; other labels stay text."""
    label = text.strip()
    return int(label) if label.removeprefix("-").isdecimal() and len(label) < 19 else label
