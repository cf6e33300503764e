"""Corrected copies of shards: fields replaced and samples left out, everything else byte for byte."""

import io
import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmssl.data.shards import SampleLimits, index_shards, is_remote
from mmssl.data.shards.groups import Group, groups
from mmssl.data.shards.samples import group_sample
from mmssl.data.shards.shard_index import windowed
from mmssl.data.shards.tar import Archive
from mmssl.errors import UserError
from mmssl.files import open_regular

_PARTIAL = ".partial"


@dataclass(frozen=True)
class Correction:
    """One row of a table of corrections."""

    shard: str
    """Path of the shard; its file name is compared."""
    key: str
    keep: bool
    """False: the sample is left out."""
    fields: Mapping[str, str]
    """Field -> its value as a cell (`as_cell`)."""


@dataclass
class Corrected:
    """Result of a correction."""

    changed: int = 0
    dropped: int = 0
    unchanged: int = 0
    """Samples copied as they were."""


def as_cell(value: Any) -> str:
    """The value of a field in a cell of a table: text as it is, everything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def correct_shards(
    shards: Sequence[str],
    corrections: Sequence[Correction],
    out: Path,
    progress: Callable[[int, int], None] | None = None,
) -> Corrected:
    """Write corrected copies of local shards, under their names, and their index.

    Args:
        progress: called with the number of shards done and the total.

    Raises:
        UserError: a correction fits no sample or no field, a shard is remote, or the folder cannot be written.
    """
    names = [Path(shard).name for shard in shards]
    if remote := [shard for shard in shards if is_remote(shard)]:
        raise UserError(f"{remote[0]} is remote; download it first, and give the local shards")
    if again := [name for name in names if names.count(name) > 1]:
        raise UserError(f"two shards are named {again[0]}; correct one folder at a time")
    wanted: dict[str, dict[str, Correction]] = {name: {} for name in names}
    for correction in corrections:
        if (name := Path(correction.shard).name) not in wanted:
            raise UserError(f"the table names the shard {correction.shard}, which is not among those given")
        wanted[name][correction.key] = correction
    found = Corrected()
    plans = {shard: _plan(shard, wanted[name], found) for shard, name in zip(shards, names, strict=True)}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for done, (shard, changes) in enumerate(plans.items(), start=1):
            _copy(Path(shard), out / Path(shard).name, changes)
            if progress is not None:
                progress(done, len(plans))
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}; pick another folder") from None
    index_shards([str(out / name) for name in names], SampleLimits())
    return found


def _plan(shard: str, corrections: Mapping[str, Correction], found: Corrected) -> dict[str, bytes | None]:
    """Name of a member -> its new content. None: it is left out."""
    plan: dict[str, bytes | None] = {}
    open_keys = set(corrections)
    with open_regular(shard) as file:
        archive = Archive(windowed(file.fileno()), Path(shard).stat().st_size)
        for number, group in enumerate(groups(archive, SampleLimits())):
            correction = None if group.defect is not None else corrections.get(group.key)
            if correction is None:
                found.unchanged += group.defect is None
                continue
            open_keys.discard(group.key)
            if not correction.keep:
                plan |= dict.fromkeys((member.name for member in group.members.values()), None)
                found.dropped += 1
                continue
            file.seek(group.start)
            changes = _changes(shard, group, file.read(group.end - group.start), number, correction)
            plan |= changes
            found.changed += bool(changes)
            found.unchanged += not changes
    if open_keys:
        raise UserError(f"{shard} has no usable sample {min(open_keys)!r}, which the table corrects")
    return plan


def _changes(shard: str, group: Group, content: bytes, number: int, correction: Correction) -> dict[str, bytes | None]:
    sample = group_sample(number, shard, group, content)
    place = f"{shard}:{group.key}"
    changed = {}
    for field, cell in correction.fields.items():
        if field not in sample.fields:
            if cell:
                raise UserError(f"{place} has no field {field!r}; empty the cell, or leave out the column")
            continue
        if cell == as_cell(sample.fields[field]):
            continue
        if not cell.strip():
            raise UserError(f"{place}: the cell of {field!r} is empty; to leave out the sample, write no under keep")
        changed[field] = _value(cell, sample.fields[field], place, field)
    files: dict[str, bytes | None] = {}
    if "txt" in changed and "txt" not in group.members and group.texts():
        files[group.texts()[0].name] = as_cell(changed.pop("txt")).encode()
    for field in [field for field in changed if field in group.members and field in ("txt", "cls")]:
        files[group.members[field].name] = as_cell(changed.pop(field)).encode()
    if changed:
        own = group.members["json"]
        begin = own.data - group.start
        record = json.loads(content[begin : begin + own.size]) | changed
        files[own.name] = json.dumps(record, ensure_ascii=False).encode()
    return files


def _value(cell: str, current: Any, place: str, field: str) -> Any:
    """The value of a cell, of the kind of the current one."""
    if isinstance(current, str):
        return cell
    try:
        return json.loads(cell)
    except ValueError:
        raise UserError(f"{place}: {cell!r} for {field!r}; write it like {as_cell(current)!r}") from None


def _copy(source: Path, target: Path, changes: Mapping[str, bytes | None]) -> None:
    if target.exists():
        raise UserError(f"{target} exists; give an empty folder")
    partial = target.with_name(target.name + _PARTIAL)
    with tarfile.open(source) as old, tarfile.open(partial, "w", format=tarfile.PAX_FORMAT) as new:
        for member in old:
            if not member.isfile():
                new.addfile(member)
            elif member.name not in changes:
                new.addfile(member, old.extractfile(member))
            elif (content := changes[member.name]) is not None:
                member.size = len(content)
                new.addfile(member, io.BytesIO(content))
    partial.replace(target)
