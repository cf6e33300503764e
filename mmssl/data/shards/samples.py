"""Samples of a tar: members grouped by key, reasons why a group is unusable, and parsing of its bytes."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from mmssl.data.shards.tar import Archive, Member, TarError
from mmssl.types import Sample

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
TEXTS = ("txt", "json")
USED = (*IMAGES, *TEXTS, "cls")
"""Extensions that are read. Other members (`.npy`, `.pyd`, `.pth` ...) are never decoded."""


@dataclass(frozen=True)
class SampleLimits:
    """Size limits, checked before a sample is read into memory."""

    max_member_bytes: int = 64 << 20
    """A larger member makes its sample unusable."""

    @property
    def max_sample_bytes(self) -> int:
        """Largest span of a tar, in bytes, that one sample may have."""
        return 4 * self.max_member_bytes


@dataclass
class Group:
    """Adjacent members of a tar with the same key."""

    key: str
    start: int
    end: int
    members: dict[str, Member] = field(default_factory=dict)
    """Extension (lower case, without the leading dot) -> member."""
    defect: str | None = None
    """Reason why the group is unusable, or None."""

    def image(self) -> Member | None:
        """The first member that is an image."""
        return next((member for extension, member in self.members.items() if extension in IMAGES), None)


def split_name(name: str) -> tuple[str, str] | None:
    """`a/b.seg.png` -> (`a/b`, `seg.png`): WebDataset's key and extension, or None for other names."""
    name = name.removeprefix("./")
    slash = name.rfind("/") + 1
    stem, dot, extension = name[slash:].partition(".")
    return (name[:slash] + stem, extension.lower()) if stem and dot and extension else None


def groups(archive: Archive, limits: SampleLimits, need_text: bool = True) -> Iterator[Group]:
    """All groups of an archive in order. Unusable ones have a `defect`.

    Raises:
        TarError: after the last group that could be found, where the archive is damaged or cut.
    """
    seen: dict[str, bool] = {}
    for group in _adjacent(archive, limits):
        group.defect = group.defect or _defect(group, limits, need_text)
        if group.key in seen:
            both = seen[group.key] and group.defect is None
            group.defect = "its key was used before" if both else "its members are not adjacent"
        seen[group.key] = group.defect is None
        yield group


def _adjacent(archive: Archive, limits: SampleLimits) -> Iterator[Group]:
    group: Group | None = None
    try:
        for member in archive.members():
            names = split_name(member.name)
            if names is None:
                continue
            key, extension = names
            if group is None or group.key != key or extension in group.members:
                if group is not None:
                    yield group
                group = Group(key, member.start, member.end)
            group.members[extension] = member
            group.end = member.end
            _refuse(group, extension, member, limits)
    except TarError as error:
        names = split_name(error.name) if error.name is not None else None
        if group is not None and names is not None and group.key == names[0]:
            group.defect = f".{names[1]} is cut"
        if group is not None:
            yield group
        if names is not None and (group is None or group.key != names[0]):
            yield Group(names[0], error.offset, archive.size, defect=f".{names[1]} is cut")
        raise
    if group is not None:
        yield group


def _refuse(group: Group, extension: str, member: Member, limits: SampleLimits) -> None:
    if member.refused is not None:
        group.defect = f".{extension} is refused: {member.refused}"
    elif member.size > limits.max_member_bytes:
        group.defect = f".{extension} has {member.size} bytes, more than the limit of {limits.max_member_bytes}"


def _defect(group: Group, limits: SampleLimits, need_text: bool) -> str | None:
    if group.image() is None:
        return "no image"
    if need_text and not any(extension in group.members for extension in TEXTS):
        return "no text"
    if group.end - group.start > limits.max_sample_bytes:
        return f"its members span {group.end - group.start} bytes"
    return None


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
    """A class number as int; other labels as text."""
    label = text.strip()
    return int(label) if label.removeprefix("-").isdecimal() and len(label) < 19 else label
