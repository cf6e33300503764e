"""Samples whose members lie apart in a tar, or are spelled differently, joined by their names."""

import unicodedata
from collections.abc import Iterator, Mapping, Sequence

from mmssl.data.shards.groups import FRAGMENT, NOT_ADJACENT, Group, describe_defect, refuse, split_dotted
from mmssl.data.shards.headers import TarError
from mmssl.data.shards.members import SampleLimits
from mmssl.data.shards.tar import Archive
from mmssl.types import CAPTION_FIELDS

APART = "its image and its text lie in different folders"
MISNAMED = "the names of its image and its text differ"
CAPTION_NAMES = {*CAPTION_FIELDS}
"""Names of the text in a folder with one image."""


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
                refuse(group, extension, member, limits)
    except TarError as error:
        damage = error
    parts = [part for found in keys.values() for group in found for part in split_dotted(group, False)]
    for group in _joined_by_name(parts):
        # Its members are read one by one, so that their span does not matter.
        group.end = group.start
        group.defect = next(iter(group.faults.values()), None) or describe_defect(group, limits, True)
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
    ways = ((APART, _base), (APART, _tail), (MISNAMED, spelling), (MISNAMED, _base_spelling), (MISNAMED, _folder))
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


def _tail(key: str) -> str:
    """The name with its folder: `train/1` of `images/train/1` and of `captions/train/1`."""
    return "/".join(key.split("/")[-2:])


def _folder(key: str) -> str:
    return key.rpartition("/")[0]


def spelling(name: str) -> str:
    """A name without its case and the form of its accents: macOS decomposes them, other systems do not."""
    return unicodedata.normalize("NFC", name.casefold())


def _base_spelling(key: str) -> str:
    return spelling(_base(key))


def _is_caption(key: str) -> bool:
    return _base(key).lower() in CAPTION_NAMES


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
