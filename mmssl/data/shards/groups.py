"""Samples of a tar as groups of members with one key, and reasons why a group is unusable."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from mmssl.data.shards.headers import TarError
from mmssl.data.shards.members import (
    IMAGE_NAMES,
    IMAGE_SET,
    MAPPED_CAPTION,
    MAPPED_IMAGE,
    TEXT_NAMES,
    USED,
    SampleLimits,
)
from mmssl.data.shards.tar import Archive, Member

_CONTAINERS = ("tar", "gz", "tgz", "bz2", "xz", "zst", "zip", "7z", "rar", "csv", "tsv", "jsonl", "parquet", "xlsx")
"""Extensions of archives and tables, which may hold pairs."""
_NUMBERED = re.compile(r"\d{1,4}")
"""Stem of one of several images or captions of a sample: KEY.0.jpg, KEY.1.jpg."""
_MANY_STEMS = 3
"""Dotted names of one key from which on each is taken for a sample, although no image has its text beside it."""
NOT_ADJACENT = "its members are not adjacent"
REPEATED = "its key was used before"
FRAGMENT = "further members of a sample that is named above"
STRAY = "a file that belongs to no sample"
UNCOUNTED = (FRAGMENT, STRAY)
"""Reasons of groups that are no samples of their own, so that they are not counted."""


@dataclass
class Group:
    """Adjacent members of a tar with the same key."""

    key: str
    start: int
    end: int
    members: dict[str, Member] = field(default_factory=dict)
    """Extension (lower case, without the leading dot) -> member."""
    faults: dict[str, str] = field(default_factory=dict)
    """Extension -> reason why this member makes the group unusable."""
    defect: str | None = None
    """Reason why the group is unusable, or None."""

    def image(self) -> Member | None:
        """The member that is named as the image, else the first that is one without a number."""
        mapped = self.members.get(MAPPED_IMAGE)
        if mapped is not None:
            return mapped
        for extension, member in self.members.items():
            if extension in IMAGE_SET:
                return member
        return None

    def images(self) -> list[Member]:
        """The image, else the numbered ones (KEY.0.jpg, KEY.1.jpg) in the order of their numbers."""
        image = self.image()
        return [image] if image is not None else self._numbered(IMAGE_NAMES)

    def texts(self) -> list[Member]:
        """The caption, else the numbered ones (KEY.0.txt, KEY.1.txt); none if the text is in the .json only."""
        text = self.members.get(MAPPED_CAPTION) or self.members.get("txt")
        return [text] if text is not None else self._numbered((MAPPED_CAPTION, "txt"))

    def _numbered(self, extensions: Sequence[str]) -> list[Member]:
        found: dict[int, Member] = {}
        for extension, member in self.members.items():
            stem, _, last = extension.rpartition(".")
            if last in extensions and _NUMBERED.fullmatch(stem):
                found.setdefault(int(stem), member)
        return [found[number] for number in sorted(found)]


def cut_reason(extension: str) -> str:
    """The reason of a group whose member is not complete."""
    return f".{extension} is cut"


def begins_hole(extension: str, content: bytes) -> bool:
    """True if the last member before a hole of zeros ends in zeros, so that the hole begins inside of it."""
    return content.endswith(bytes(4 if extension in IMAGE_NAMES else 1))


def groups(archive: Archive, limits: SampleLimits, need_text: bool = True) -> Iterator[Group]:
    """All groups of an archive in order. Unusable ones have a `defect`.

    A key ends at the first dot of a name, as in WebDataset. Where dotted names pair up (`a.v1.jpg` with `a.v1.txt`),
    each pair is a sample, with the key `a.v1`.

    Raises:
        TarError: after the last group that could be found, where the archive is damaged or cut.
    """
    seen: dict[str, bool] = {}
    dotted: set[str] = set()
    for whole in _adjacent(archive, limits):
        for group in split_dotted(whole, whole.key in dotted):
            if group.key != whole.key:
                dotted.add(whole.key)
            group.defect = (
                group.defect or next(iter(group.faults.values()), None) or describe_defect(group, limits, need_text)
            )
            if group.key in seen:
                group.defect = REPEATED if seen[group.key] else NOT_ADJACENT
            seen[group.key] = seen.get(group.key, False) or group.defect is None
            yield group


def _adjacent(archive: Archive, limits: SampleLimits) -> Iterator[Group]:
    group: Group | None = None
    try:
        for member in archive.members():
            names = limits.members.split(member.name)
            if names is None:
                continue
            key, extension = names
            if group is None or group.key != key or extension in group.members or _ends_pair(group, extension):
                if group is not None:
                    yield group
                group = Group(key, member.start, member.end)
            group.members[extension] = member
            group.end = member.end
            refuse(group, extension, member, limits)
    except TarError as error:
        names = limits.members.split(error.name) if error.name is not None else None
        if group is not None and names is not None and group.key == names[0]:
            group.faults[names[1]] = f".{names[1]} {error.reason}"
        if group is not None:
            yield group
        if names is not None and (group is None or group.key != names[0]):
            yield Group(names[0], error.offset, archive.size, defect=f".{names[1]} {error.reason}")
        raise
    if group is not None:
        yield group


def _stem(extension: str) -> str:
    """`v1.jpg` -> `v1`; nothing for an extension without a dot."""
    return extension.rpartition(".")[0]


def _dotted_pairs(group: Group, extensions: Iterable[str]) -> set[str]:
    """Stems under which these members of a group are an image and its text.

    Beside an image without a stem, .json and .cls members may describe that one, so that only .txt tells a pair.
    """
    lasts: dict[str, set[str]] = {}
    for extension in extensions:
        stem, _, last = extension.rpartition(".")
        lasts.setdefault(stem, set()).add(last)
    texts = {*TEXT_NAMES, "cls"}
    pairs = {stem for stem, found in lasts.items() if stem and found & {*IMAGE_NAMES} and found & texts}
    return (
        {stem for stem in pairs if lasts[stem] & {"txt", MAPPED_CAPTION}}
        if pairs and group.image() is not None
        else pairs
    )


def _ends_pair(group: Group, extension: str) -> bool:
    """True if the group ends in a dotted pair that a member with this extension does not belong to.

    Such a group is closed at once: thousands of samples may share the part before the first dot.
    """
    stem = _stem(next(reversed(group.members)))
    if stem in ("", _stem(extension)):
        return False
    return bool(_dotted_pairs(group, takewhile(lambda e: _stem(e) == stem, reversed(group.members))))


def _dotted_stems(group: Group, known: bool) -> set[str]:
    """Stems that name samples of their own.

    Args:
        known: stems of this key named samples before.
    """
    pairs = _dotted_pairs(group, group.members)
    if group.image() is not None:
        return pairs
    used = [extension for extension in group.members if extension.rpartition(".")[2] in USED]
    stems, images = {_stem(extension) for extension in used}, sum(e.endswith(IMAGE_NAMES) for e in used)
    alike = len(stems) == 1 or (len(stems) >= _MANY_STEMS and images in (0, len(used), len(stems)))
    return stems - {""} if pairs or known or ("" not in stems and alike) else set()


def split_dotted(group: Group, known: bool) -> Iterator[Group]:
    """Split off the samples with dotted names of their own. Other groups stay whole."""
    # Most groups have no dotted name, and indexing is as fast as this is.
    is_dotted = any("." in extension for extension in group.members)
    stems = _dotted_stems(group, known) if is_dotted else set()
    if not stems:
        yield group
        return
    parts: dict[str, Group] = {}
    last: Group | None = None
    for extension in (*group.members, *(e for e in group.faults if e not in group.members)):
        stem = _stem(extension) if _stem(extension) in stems else ""
        member = group.members.get(extension)
        own = extension.removeprefix(f"{stem}.") if stem else extension
        key = f"{group.key}.{stem}" if stem else group.key
        part = parts.setdefault(stem, Group(key, group.end if member is None else member.start, group.end))
        if extension in group.faults:
            part.faults[own] = group.faults[extension]
        if member is not None:
            if part.members and part is not last:
                part.defect = NOT_ADJACENT
            part.members[own] = member
            part.end = member.end if part.defect is None else part.end
            last = part
    yield from sorted(parts.values(), key=lambda part: part.start)


def refuse(group: Group, extension: str, member: Member, limits: SampleLimits) -> None:
    """Note the fault of a member that is refused or too large."""
    if member.refused is not None:
        group.faults[extension] = f".{extension} is refused: {member.refused}"
    elif member.size > limits.max_member_bytes:
        limit = limits.max_member_bytes
        group.faults[extension] = f".{extension} has {member.size} bytes, more than the limit of {limit}"


def describe_defect(group: Group, limits: SampleLimits, need_text: bool) -> str | None:
    """The reason why a group without faults is unusable, or None."""
    if len(group.members) == 1 and not any(extension in USED for extension in group.members):
        (extension,) = group.members
        is_container = extension.rpartition(".")[2] in _CONTAINERS
        return f"a .{extension} file within a tar is not read" if is_container else STRAY
    if limits.images and not group.images():
        return f"no image{_other_members(group)}"
    texts = [*group.texts(), *(member for extension, member in group.members.items() if extension == "json")]
    if need_text and not texts:
        return f"no text{_other_members(group)}"
    # A label may stand for the caption, through a template.
    if need_text and "cls" not in group.members and all(member.size == 0 for member in texts):
        return "the caption is empty"
    if group.end - group.start > limits.max_sample_bytes:
        return f"its members span {group.end - group.start} bytes"
    return None


def _other_members(group: Group) -> str:
    """The extensions of a group without image or text, if some have no meaning here and may hold what is missing."""
    if all(extension in USED for extension in group.members):
        return ""
    names = [f".{extension}" for extension in group.members]
    return f": its members are {', '.join(names[:6])}{' ...' if len(names) > 6 else ''}"
