"""Samples of a tar: members grouped by key, reasons why a group is unusable, and parsing of its bytes."""

import io
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import numpy as np

from mmssl.data.shards.headers import TarError
from mmssl.data.shards.tar import Archive, Member
from mmssl.types import Sample

_COMMON_IMAGES = ("jpg", "jpeg", "jfif", "jpe", "png", "webp", "gif", "bmp", "tif", "tiff")
_FURTHER_IMAGES = ("apng", "avif", "jp2", "j2k", "jpx", "ppm", "pgm", "pbm", "pnm", "qoi")
IMAGES = (*_COMMON_IMAGES, *_FURTHER_IMAGES)
"""Extensions of images. The format itself is recognised by the first bytes."""
_IMAGE_SET = frozenset(IMAGES)
TEXTS = ("txt", "json")
MAPPED_IMAGE, MAPPED_CAPTION = "image=", "caption="
"""Extensions that members get here which a `MemberNames` names. No file has them."""
_IMAGES = (MAPPED_IMAGE, *IMAGES)
_TEXTS = (MAPPED_CAPTION, *TEXTS)
CAPTION_FIELDS = ("caption", "text", "captions")
"""Fields of the .json that stand for a missing .txt, in order of preference."""
USED = (*_IMAGES, *_TEXTS, "cls")
"""Extensions that are read, and `.npy` of zeros and ones. Other members (`.pyd`, `.pth` ...) are never decoded."""

_CAPTION_NAMES = {*CAPTION_FIELDS, "txt", "prompt", "description", "title"}
"""Names of the text in a folder with one image."""
LONGEST_LABELS = 1 << 16
"""Bytes of a `.npy` that is read. Other arrays, such as embeddings, are mostly larger."""
_NUMBERED = re.compile(r"\d{1,4}")
"""Stem of one of several images or captions of a sample: KEY.0.jpg, KEY.1.jpg."""
_MANY_STEMS = 3
"""Dotted names of one key from which on each is taken for a sample, although no image has its text beside it."""
NOT_ADJACENT = "its members are not adjacent"
REPEATED = "its key was used before"
APART = "its image and its text lie in different folders"
MISNAMED = "the names of its image and its text differ"
FRAGMENT = "further members of a sample that is named above"
STRAY = "a file that belongs to no sample"
UNCOUNTED = (FRAGMENT, STRAY)
"""Reasons of groups that are no samples of their own, so that they are not counted."""


@dataclass(frozen=True)
class MemberNames:
    """Members that hold the image and the caption, where they are not named as usual.

    `img_content` stands for KEY.img_content, `input.jpg` for KEY.input.jpg or, with a folder per sample, KEY/input.jpg.
    """

    image: tuple[str, ...] = ()
    caption: tuple[str, ...] = ()

    @classmethod
    def of(cls, image: Iterable[str] = (), caption: Iterable[str] = ()) -> "MemberNames":
        """Names in any case, with or without a leading dot."""
        return cls(*(tuple(name.removeprefix(".").lower() for name in names) for names in (image, caption)))

    def split(self, name: str) -> tuple[str, str] | None:
        """As `split_name`, with the extension of a named member replaced."""
        names = split_name(name)
        if names is None:
            return None
        key, extension = names
        folder, _, base = key.rpartition("/")
        for wanted, mapped in ((self.image, MAPPED_IMAGE), (self.caption, MAPPED_CAPTION)):
            for own in wanted:
                if extension == own or extension.endswith(f".{own}"):
                    return key, extension.removesuffix(own) + mapped
                if folder and f"{base}.{extension}".lower() == own:
                    return folder, mapped
        return names


USUAL_MEMBERS = MemberNames()


@dataclass(frozen=True)
class SampleLimits:
    """What is read of a shard: size limits, checked before a sample is read into memory, and names of members."""

    max_member_bytes: int = 64 << 20
    """A larger member makes its sample unusable."""
    members: MemberNames = USUAL_MEMBERS
    """Members that hold the image and the caption, beside the usual ones."""

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
            if extension in _IMAGE_SET:
                return member
        return None

    def images(self) -> list[Member]:
        """The image, else the numbered ones (KEY.0.jpg, KEY.1.jpg) in the order of their numbers."""
        image = self.image()
        return [image] if image is not None else self._numbered(_IMAGES)

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


def split_name(name: str) -> tuple[str, str] | None:
    """`a/b.seg.png` -> (`a/b`, `seg.png`): WebDataset's key and extension, or None for other and hidden names."""
    name = name.removeprefix("./")
    if "__MACOSX" in name and "__MACOSX" in name.split("/"):  # macOS's copies of attributes, which no program reads
        return None
    slash = name.rfind("/") + 1
    stem, dot, extension = name[slash:].partition(".")
    return (name[:slash] + stem, extension.lower()) if stem and dot and extension else None


def scattered_groups(archive: Archive, limits: SampleLimits) -> Iterator[Group]:
    """The groups of an archive, whose members may lie anywhere in it. Unusable ones have a `defect`.

    An image and a text with one name in different folders belong together, unless others have that name too. A key that
    repeats an extension makes a further group.

    Raises:
        TarError: after the last group that could be found, where the archive is damaged or cut.
    """
    keys: dict[str, list[Group]] = {}
    damage: TarError | None = None
    try:
        for member in archive.members():
            names = limits.members.split(member.name)
            if names is not None:
                key, extension = names
                found = keys.setdefault(key, [])
                group = next((group for group in found if extension not in group.members), None)
                if group is None:
                    group = Group(key, member.start, member.end)
                    found.append(group)
                group.members[extension] = member
                _refuse(group, extension, member, limits)
    except TarError as error:
        damage = error
    parts = [part for found in keys.values() for group in found for part in _split_dotted(group, False)]
    for group in _joined_by_name(parts):
        # Its members are read one by one, so that their span does not matter.
        group.end = group.start
        group.defect = next(iter(group.faults.values()), None) or _defect(group, limits, True)
        yield group
    if damage is not None:
        raise damage


def _joined_by_name(parts: Sequence[Group]) -> list[Group]:
    """The groups, with a text alone put to the image alone that it belongs to."""
    images: dict[int, str] = {}
    texts: dict[int, str] = {}
    for place, part in enumerate(parts):
        has_text = bool(part.texts()) or "json" in part.members
        if (not part.images()) == has_text:
            (texts if has_text else images)[place] = part.key
    moved: set[int] = set()
    for image, text, _ in match_names(images, texts):
        own, other = parts[image], parts[text]
        own.members.update({e: m for e, m in other.members.items() if e not in own.members})
        own.faults.update(other.faults)
        moved.add(text)
    return [part for place, part in enumerate(parts) if place not in moved]


def match_names(images: Mapping[int, str], texts: Mapping[int, str]) -> Iterator[tuple[int, int, str]]:
    """Images and texts that belong together although their keys differ, and the reason why they were apart.

    Their names are equal in different folders, or equal but for case and the form of accents (macOS decomposes them),
    or both are alone in a folder and the text is called `caption` or the like. Where there is a choice, nothing is
    matched.

    Args:
        images, texts: number -> key.
    """
    images, texts = dict(images), dict(texts)
    ways = ((APART, _base), (MISNAMED, _spelling), (MISNAMED, _base_spelling), (MISNAMED, _folder))
    for reason, identity in ways:
        found: dict[str, tuple[list[int], list[int]]] = {}
        for side, names in enumerate((images, texts)):
            for number, key in names.items():
                found.setdefault(identity(key), ([], []))[side].append(number)
        for one, other in found.values():
            if len(one) == len(other) == 1 and (identity is not _folder or _is_caption(texts[other[0]])):
                yield one[0], other[0], reason
                del images[one[0]], texts[other[0]]


def _base(key: str) -> str:
    return key.rpartition("/")[2]


def _folder(key: str) -> str:
    return key.rpartition("/")[0]


def _spelling(key: str) -> str:
    return unicodedata.normalize("NFC", key.casefold())


def _base_spelling(key: str) -> str:
    return _spelling(_base(key))


def _is_caption(key: str) -> bool:
    return _base(key).lower() in _CAPTION_NAMES


def cut_reason(extension: str) -> str:
    """The reason of a group whose member is not complete."""
    return f".{extension} is cut"


def begins_hole(extension: str, content: bytes) -> bool:
    """True if the last member before a hole of zeros ends in zeros, so that the hole begins inside of it."""
    return content.endswith(bytes(4 if extension in _IMAGES else 1))


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
        for group in _split_dotted(whole, whole.key in dotted):
            if group.key != whole.key:
                dotted.add(whole.key)
            group.defect = group.defect or next(iter(group.faults.values()), None) or _defect(group, limits, need_text)
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
            _refuse(group, extension, member, limits)
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
    texts = {*_TEXTS, "cls"}
    pairs = {stem for stem, found in lasts.items() if stem and found & {*_IMAGES} and found & texts}
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
    stems, images = {_stem(extension) for extension in used}, sum(e.endswith(_IMAGES) for e in used)
    alike = len(stems) == 1 or (len(stems) >= _MANY_STEMS and images in (0, len(used), len(stems)))
    return stems - {""} if pairs or known or ("" not in stems and alike) else set()


def _split_dotted(group: Group, known: bool) -> Iterator[Group]:
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


def _refuse(group: Group, extension: str, member: Member, limits: SampleLimits) -> None:
    if member.refused is not None:
        group.faults[extension] = f".{extension} is refused: {member.refused}"
    elif member.size > limits.max_member_bytes:
        limit = limits.max_member_bytes
        group.faults[extension] = f".{extension} has {member.size} bytes, more than the limit of {limit}"


def _defect(group: Group, limits: SampleLimits, need_text: bool) -> str | None:
    if len(group.members) == 1 and not any(extension in USED for extension in group.members):
        return STRAY
    if not group.images():
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


def join_parts(left_out: Sequence[tuple[str, str]]) -> list[str]:
    """The reasons of the unusable groups of a shard, given as (key, reason), with every sample named once.

    Where the members of a sample lie apart, its first group says so, and its others are fragments. The same holds for
    an image and a text that belong together (`match_names`).
    """
    reasons = [reason for _, reason in left_out]
    apart = {key for key, reason in left_out if reason == NOT_ADJACENT}
    first: dict[str, int] = {}
    alone: dict[str, dict[int, str]] = {"no text": {}, "no image": {}}
    for number, (key, reason) in enumerate(left_out):
        if key in apart:
            begin = first.setdefault(key, number)
            reasons[begin] = NOT_ADJACENT
            reasons[number] = FRAGMENT if number != begin and reason == NOT_ADJACENT else reasons[number]
        elif reason in alone:
            alone[reason][number] = key
    for image, text, why in match_names(alone["no text"], alone["no image"]):
        reasons[image], reasons[text] = why, FRAGMENT
    return reasons


def _other_members(group: Group) -> str:
    """The extensions of a group without image or text, if some have no meaning here and may hold what is missing."""
    if all(extension in USED for extension in group.members):
        return ""
    names = [f".{extension}" for extension in group.members]
    return f": its members are {', '.join(names[:6])}{' ...' if len(names) > 6 else ''}"


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
    image, *more = (_bytes_of(member, read) for member in group.images())
    return Sample(number, shard, group.key, image, fields, tuple(more))


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
    if "txt" not in fields:
        name = next((name for name in CAPTION_FIELDS if isinstance(fields.get(name), str)), None)
        if name is not None:
            fields["txt"] = fields[name]
    return fields


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
