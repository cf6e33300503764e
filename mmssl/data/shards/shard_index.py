"""The index of one shard: the offsets of its samples, found by reading only the tar headers."""

import hashlib
import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmssl.data.shards.damage import describe_foreign, describe_tail
from mmssl.data.shards.groups import UNCOUNTED, Group, begins_hole, cut_reason, groups
from mmssl.data.shards.headers import TarError
from mmssl.data.shards.joining import join_parts
from mmssl.data.shards.members import USUAL_MEMBERS, MemberNames, SampleLimits
from mmssl.data.shards.tar import Archive, ReadAt
from mmssl.errors import UserError
from mmssl.files import open_regular
from mmssl.types import image_key

_WINDOW = 16 << 10
RULES = 5
"""Version of the rules for what a sample is. An index of other rules is made again where its shard is at hand."""

Offsets = NDArray[np.uint64]


@dataclass(frozen=True)
class LeftOut:
    """An excluded sample, and the reason."""

    ordinal: int
    """Position in the shard, counting every group."""
    key: str
    reason: str


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """The index of one shard."""

    shard: str
    bytes: int
    """Size of the file in bytes."""
    mtime_ns: int
    """Modification time of the file."""
    groups: int
    """Number of samples, including unusable ones."""
    left_out: tuple[LeftOut, ...]
    problems: tuple[str, ...]
    """Problems of the shard itself, such as truncation."""
    checksum: str
    """BLAKE2b-128 of the offsets' bytes."""
    max_member_bytes: int
    """The limit that was used to make the index."""
    offsets: Offsets | None = None
    """[groups + 1], if they are not stored in a file."""
    members: MemberNames = USUAL_MEMBERS
    """The names of members that were used to make the index."""
    images: bool = True
    """Samples without an image were left out."""
    rules: int = RULES
    """Version of the rules that were used to make the index."""

    @property
    def limits(self) -> SampleLimits:
        """Limits that were used to make the index."""
        return SampleLimits(self.max_member_bytes, self.members, self.images)

    @property
    def samples(self) -> int:
        """Number of usable samples."""
        return self.groups - len(self.left_out)

    @property
    def lost(self) -> list[LeftOut]:
        """Excluded samples, each once: without further members of a sample that is excluded already."""
        return [out for out in self.left_out if out.reason not in UNCOUNTED]

    def ranges(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First byte and end of each usable sample of a local shard, int64 [samples] each.

        Raises:
            UserError: the shard changed since it was indexed.
        """
        offsets = self.offsets if self.offsets is not None else _read_offsets(self)
        if offsets is None:
            offsets = index_shard(self.shard, self.limits).offsets
            assert offsets is not None
        return self.usable(offsets)

    def usable(self, offsets: Offsets) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First byte and end of each usable sample. Raises UserError if `offsets` differ from the indexed ones."""
        if len(offsets) != self.groups + 1 or checksum(offsets) != self.checksum:
            raise UserError(f"shard {self.shard} changed while it was in use; start again with --resume")
        bounds = offsets.astype(np.int64)
        keep = np.ones(self.groups, dtype=bool)
        keep[[out.ordinal for out in self.left_out]] = False
        return bounds[:-1][keep], bounds[1:][keep]


def index_shard(shard: str, limits: SampleLimits) -> ShardIndex:
    """The index of one local shard, read from its headers."""
    try:
        with open_regular(shard) as file:
            status = os.fstat(file.fileno())
            archive = Archive(windowed(file.fileno()), status.st_size)
            return index_archive(shard, archive, status.st_mtime_ns, limits)
    except OSError as error:
        raise UserError(f"shard {shard} cannot be read: {error.strerror}") from None


def index_archive(shard: str, archive: Archive, mtime_ns: int, limits: SampleLimits) -> ShardIndex:
    """The index of an archive."""
    found = _Found()
    problems = list(_collect(archive, limits, found))
    end = found.last.end if found.last is not None else 0
    offsets = np.array([*found.starts, end], dtype="<u8")
    out = found.left_out
    reasons = join_parts([(key, reason) for _, key, reason in out])
    left_out = (LeftOut(i, key, reason) for (i, key, _), reason in zip(out, reasons, strict=True))
    return ShardIndex(
        shard=shard,
        bytes=archive.size,
        mtime_ns=mtime_ns,
        groups=len(found.starts),
        left_out=tuple(left_out),
        problems=tuple(problems),
        checksum=checksum(offsets),
        max_member_bytes=limits.max_member_bytes,
        members=limits.members,
        images=limits.images,
        offsets=offsets,
    )


def usable_groups(index: ShardIndex) -> Iterator[tuple[Group, ReadAt]]:
    """The members of each usable sample of a local shard, in order, and a reader of the shard's bytes.

    Raises:
        UserError: the shard changed since it was indexed, or cannot be read.
    """
    left_out = {out.ordinal for out in index.left_out}
    found = 0
    try:
        with open_regular(index.shard) as file:
            archive = Archive(windowed(file.fileno()), index.bytes)
            # Behind the last indexed sample may lie the damage that ends the shard.
            for ordinal, group in zip(range(index.groups), groups(archive, index.limits), strict=False):
                if ordinal not in left_out:
                    found += 1
                    yield group, archive.read
    except (OSError, TarError) as error:
        raise UserError(f"shard {index.shard} cannot be read: {error}; restore it") from None
    if found != index.samples:
        raise UserError(f"shard {index.shard} changed while it was in use; start again")


def image_ranges(
    shard: str, mtime_ns: int, size: int, members: MemberNames = USUAL_MEMBERS
) -> dict[str, tuple[int, int]]:
    """First byte and size of each image of each sample in a local shard, by key; up to the damage if it is damaged.

    `mtime_ns` and `size` describe the file, so that a cache of the results notices when it changes.
    """
    found: dict[str, tuple[int, int]] = {}
    with open_regular(shard) as file:
        try:
            for group in groups(Archive(windowed(file.fileno()), size), SampleLimits(members=members), need_text=False):
                images = group.images() if group.defect is None else []
                # Further images have the keys of `Sample.each_image`.
                for number, member in enumerate(images):
                    found[image_key(group.key, number)] = (member.data, member.size)
        except TarError:
            return found
    return found


@dataclass
class _Found:
    """The groups of a shard. The groups themselves would take a thousand times the memory of their starts."""

    starts: "array[int]" = field(default_factory=lambda: array("Q"))
    left_out: list[tuple[int, str, str]] = field(default_factory=list)
    """Number, key and reason."""
    last: Group | None = None

    def add(self, group: Group) -> None:
        """Add the next group."""
        self.starts.append(group.start)
        self.last = group
        if group.defect is not None:
            self.leave_out(group.defect)

    def leave_out(self, reason: str) -> None:
        """Leave out the last group."""
        assert self.last is not None
        self.left_out.append((len(self.starts) - 1, self.last.key, reason))


def _collect(archive: Archive, limits: SampleLimits, found: _Found) -> Iterator[str]:
    """Add every group to `found`; yield the problems of the shard itself."""
    if archive.size == 0:
        yield "the file is empty; download or pack it again"
        return
    try:
        for group in groups(archive, limits):
            found.add(group)
    except TarError as error:
        yield describe_damage(archive, error)
        return
    tail = describe_tail(archive, len(found.starts))
    if tail is not None:
        yield tail
        last = found.last
        if last is not None and last.defect is None and archive.end < archive.size:
            extension, member = next(reversed(last.members.items()))
            if begins_hole(extension, archive.read(member.data, member.size)):
                found.leave_out(cut_reason(extension))


def describe_damage(archive: Archive, error: TarError) -> str:
    """A sentence about an archive that cannot be read to its end."""
    foreign = describe_foreign(archive) if error.offset == 0 else None
    return (
        foreign or f"{error}; the {archive.size - error.offset} bytes from there on are not used: get the shard again"
    )


def windowed(file: int) -> ReadAt:
    """Positioned reads through a window of 16 KiB: the headers of small members are close to each other."""
    window, begin = b"", 0

    def read(offset: int, count: int) -> bytes:
        nonlocal window, begin
        if not begin <= offset <= offset + count <= begin + len(window):
            window, begin = os.pread(file, max(count, _WINDOW), offset), offset
        return window[offset - begin : offset - begin + count]

    return read


def checksum(offsets: Offsets) -> str:
    """BLAKE2b-128 of the offsets' bytes."""
    return hashlib.blake2b(offsets.astype("<u8").tobytes(), digest_size=16).hexdigest()


def offsets_path(shard: str) -> Path:
    """The file beside a shard that holds its offsets."""
    return Path(f"{shard}.idx")


def _read_offsets(index: ShardIndex) -> Offsets | None:
    """The stored offsets, or None if the file is missing or does not match the index."""
    try:
        offsets: Offsets = np.fromfile(offsets_path(index.shard), dtype="<u8")
    except OSError:
        return None
    return offsets if len(offsets) == index.groups + 1 and checksum(offsets) == index.checksum else None
