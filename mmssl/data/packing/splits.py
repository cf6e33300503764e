"""Records distributed over splits: by a hash of their keys, or by a field that names the split of each."""

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmssl.data.packing import values
from mmssl.data.packing.records import Defects, RecordError, Records
from mmssl.errors import UserError

_MOST = 20
"""Names of splits in a field. More tell that it holds something else."""

Splits = Mapping[str, float] | str
"""Name of a split -> its fraction of the records; or the field that names the split of each record."""


@dataclass(frozen=True)
class Division:
    """The records of each split."""

    numbers: dict[str, list[int]]
    """Split -> the indices of its records, in order."""
    sizes: Mapping[str, float]
    """Split -> its size, in any unit."""
    options: tuple[object, ...]
    """What was asked for. A folder that was packed with other options is refused."""
    defects: Defects = field(default_factory=list)
    """Key and error of each record that belongs to no split."""


def divide(records: Records, keys: Sequence[str], splits: Splits | None, group_by: str | None) -> Division:
    """Distribute records over splits. Records that share an image, or the group, are in one split.

    Args:
        keys: the keys of the records.
        splits: fractions, or a field. Default: all in `train`.
        group_by: field whose equal values stay in one split.

    Raises:
        UserError: the fractions are no fractions, no record has a field, or the field names no splits.
    """
    owners = records.owners()
    if group_by is not None:
        owners = join_owners(owners, records.values(group_by))
    options = () if group_by is None else (f"grouped by {group_by}",)
    if isinstance(splits, str):
        numbers, defects = _by_names(keys, owners, records.values(splits), splits)
        sizes = {name: len(found) for name, found in numbers.items()}
        return Division(numbers, sizes, (f"split by {splits}", *options), defects)
    fractions = dict(splits or {"train": 1.0})
    return Division(by_hash(owners, fractions), fractions, (sorted(fractions.items()), *options))


def by_hash(owners: Sequence[str], fractions: Mapping[str, float]) -> dict[str, list[int]]:
    """Indices of the records of each split, chosen by a hash of their owners."""
    total = sum(fractions.values())
    if not 0 < total < math.inf or min(fractions.values()) < 0:
        raise UserError(f"the fractions of the splits {dict(fractions)} must be positive numbers")
    found: dict[str, list[int]] = {name: [] for name in fractions}
    for number, owner in enumerate(owners):
        place, end = hash_of(owner) / 2**64 * total, 0.0
        for name, share in fractions.items():
            end += share
            if place < end:
                found[name].append(number)
                break
    return found


def _by_names(
    keys: Sequence[str], owners: Sequence[str], cells: Sequence[Any], field: str
) -> tuple[dict[str, list[int]], Defects]:
    """Indices of the records of each split that a field names, and the records that belong to none."""
    found: dict[str, list[int]] = {}
    defects: Defects = []
    first: dict[str, str] = {}
    for number, (key, owner, cell) in enumerate(zip(keys, owners, cells, strict=True)):
        name = "" if values.is_missing(cell) else re.sub(r"[^\w-]+", "_", str(cell).strip().lower())
        if not name:
            defects.append((key, RecordError("no split is named", f"{field!r} is empty", "write its split, as train")))
        elif (other := first.setdefault(owner, name)) != name:
            remedy = "name one split for all records of an image or group"
            defects.append((key, RecordError("its image or group is in another split", f"{name}, not {other}", remedy)))
        else:
            found.setdefault(name, []).append(number)
    if not 0 < len(found) <= _MOST:
        shown = f"{len(found):,} values, such as {', '.join(list(found)[:3])}" if found else "nothing"
        raise UserError(f"the field {field!r} holds {shown}; name a field with a few splits, such as train, val, test")
    return found, defects


def join_owners(owners: Sequence[str], groups: Sequence[Any]) -> list[str]:
    """Owners of records of which those with equal groups belong together too, also over several steps.

    Args:
        groups: for each record, its group. None or an empty text: none.
    """
    parents: dict[str, str] = {}

    def root(name: str) -> str:
        while (parent := parents.get(name, name)) != name:
            parents[name] = parents.get(parent, parent)
            name = parent
        return name

    first: dict[str, str] = {}
    for owner, group in zip(owners, groups, strict=True):
        if group not in (None, ""):
            other = root(first.setdefault(str(group), owner))
            parents[root(owner)] = other
    return [root(owner) for owner in owners]


def hash_of(text: str) -> int:
    """A number of 64 bits that depends on a text alone."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
