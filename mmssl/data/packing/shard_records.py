"""Shards as a source: packed again, samples whose members lie apart are joined and unusable ones left out."""

import hashlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmssl.data.packing import values
from mmssl.data.packing.columns import field_values
from mmssl.data.packing.records import Defects, Fields, Images, RecordError, Records, captions_as_fields, record_key
from mmssl.data.shards import SampleLimits
from mmssl.data.shards.account import DAMAGED
from mmssl.data.shards.causes import cause_of, remedy_of
from mmssl.data.shards.damage import describe_tail
from mmssl.data.shards.groups import UNCOUNTED, Group, begins_hole, cut_reason
from mmssl.data.shards.headers import TarError
from mmssl.data.shards.joining import scattered_groups
from mmssl.data.shards.samples import SampleError, read_fields, read_sample
from mmssl.data.shards.shard_index import describe_damage, windowed
from mmssl.data.shards.tar import Archive
from mmssl.data.shards.urls import each_once
from mmssl.errors import UserError
from mmssl.files import open_regular


@dataclass(frozen=True)
class _Place:
    """A sample of a shard."""

    shard: str
    group: Group


class ShardRecords(Records):
    """Samples of local shards, in the order of the shards. The index of a shard is neither read nor written."""

    ordered = True

    def __init__(self, shards: Sequence[str], limits: SampleLimits | None = None) -> None:
        """
        Raises:
            UserError: a shard cannot be opened.
        """
        self._places: list[_Place] = []
        self._defects: Defects = []
        self._stamps: list[tuple[str, int, int]] = []
        for shard in each_once(shards):
            self._add(shard, limits or SampleLimits())

    def keys(self) -> list[str]:
        keys: list[str] = []
        used: set[str] = set()
        for place in self._places:
            key = record_key(place.group.key)
            # A repeated key gets the name of its shard, and a number if that does not suffice.
            named = f"{record_key(Path(place.shard).stem)}/{key}"
            names = itertools.chain([key, named], (f"{named}_{number}" for number in itertools.count(2)))
            keys.append(next(name for name in names if name not in used))
            used.add(keys[-1])
        return keys

    def defects(self) -> Defects:
        return [*self._defects, *self.beside]

    def values(self, field: str) -> list[Any]:
        shards = {place.shard for place in self._places}
        name = min(shards) if len(shards) == 1 else f"{min(shards, default='the shards')} and others"
        return field_values(name, field, self._all_fields())

    def identity(self) -> str:
        return hashlib.blake2b(repr(self._stamps).encode(), digest_size=16).hexdigest()

    def load(self, number: int) -> tuple[Images, Fields]:
        place = self._places[number]
        if place.group.defect is not None:
            raise _error(place.group.defect, f"{place.shard}:{place.group.key}")
        try:
            with open_regular(place.shard) as file:
                sample = read_sample(
                    number, place.shard, place.group, lambda start, stop: os.pread(file.fileno(), stop - start, start)
                )
        except SampleError as error:
            raise _error(str(error), f"{place.shard}:{place.group.key}") from None
        except OSError as error:
            raise RecordError("a shard cannot be read", f"{place.shard}: {error.strerror}", "restore it") from None
        fields = dict(sample.fields)
        if not isinstance(fields.get("txt"), str):
            found = values.caption_field(fields)
            if found is None:
                raise RecordError("the .json has no caption", ", ".join(fields), "put the caption into KEY.txt")
            fields |= captions_as_fields(values.captions(fields[found]), found)
        return (sample.image, *sample.more_images), fields

    def _all_fields(self) -> Iterator[Mapping[str, Any]]:
        """The fields of each sample; none for those that `load` refuses."""
        for shard, places in itertools.groupby(self._places, lambda place: place.shard):
            with open_regular(shard) as file:
                read = windowed(file.fileno())
                for place in places:
                    fields: Mapping[str, Any] = {}
                    with suppress(SampleError):
                        fields = read_fields(place.group, lambda start, stop: read(start, stop - start))  # noqa: B023
                    yield fields

    def _add(self, shard: str, limits: SampleLimits) -> None:
        """Add the samples of a shard, and its damage."""
        try:
            with open_regular(shard) as file:
                status = os.fstat(file.fileno())
                self._stamps.append((Path(shard).name, status.st_size, status.st_mtime_ns))
                archive, before = Archive(windowed(file.fileno()), status.st_size), len(self._places)
                try:
                    found = (group for group in scattered_groups(archive, limits) if group.defect not in UNCOUNTED)
                    self._places += (_Place(shard, group) for group in found)
                    damage = describe_tail(archive, len(self._places) - before)
                    if damage is not None and archive.end < archive.size:
                        _refuse_hole([place.group for place in self._places[before:]], archive)
                except TarError as error:
                    damage = describe_damage(archive, error)
        except OSError as error:
            raise UserError(f"shard {shard} cannot be read: {error.strerror}") from None
        if damage is not None:
            self._defects.append((shard, RecordError(DAMAGED, damage)))


def _refuse_hole(groups: Sequence[Group], archive: Archive) -> None:
    """Leave out the sample whose last member ends in the zeros that follow it."""
    members = [(member.data, extension, group) for group in groups for extension, member in group.members.items()]
    if members:
        _, extension, group = max(members, key=lambda found: found[0])
        member = group.members[extension]
        if begins_hole(extension, archive.read(member.data, member.size)):
            group.defect = group.defect or cut_reason(extension)


def _error(reason: str, place: str) -> RecordError:
    return RecordError(cause_of(reason), f"{reason}, {place}", remedy_of(reason))
