"""Preparation of data in any form as shards, split into training and held-out pairs."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from glob import escape, has_magic
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mmssl import system
from mmssl.config import SourceConfig
from mmssl.data import Account, expand
from mmssl.data.packing import BAD, Encoding, open_records, pack, table_suffix
from mmssl.data.shards import TABLES, Progress, SampleLimits, ShardIndex, describe_problems, is_remote
from mmssl.data.sources import account_of_indexes, folder_shards, index_source, set_apart
from mmssl.data.storage import Access
from mmssl.errors import UserError

_log = logging.getLogger(__name__)
LEAST = 8
"""Minimum number of training pairs."""
SIDE = 512
"""Shorter side in pixels of packed images: decoding large photographs in every epoch would take longer than training
on them."""
FEW_SHARDS = 3
"""Held-out shards below which their pairs may be of one kind."""
SAME_KIND = (
    "; if each shard holds one kind of pairs, that is all it measures: to hold out single pairs, pack the shards: "
    "mmssl shards pack SHARDS --out DIR --split train=0.9 --split val=0.1"
)
TRAIN, HELD_OUT = "train", "held-out"

Weighted = SourceConfig | Mapping[str, Any]
"""A source of a mixture: `shards` and `weight`."""
Source = str | Path | Sequence[str | Path | Weighted]
"""A folder of images with captions, a table, or shards: a folder, a pattern, a list of patterns, or a mixture, as in
`data.train`."""


@dataclass(frozen=True)
class Prepared:
    """Shards of training and held-out pairs."""

    train: str | list[Any]
    """Value for `data.train`."""
    pairs: int
    held_out: str | None
    """Pattern of the held-out shards. None: nothing is held out."""
    held_out_pairs: int
    why: str
    """Description of the held-out pairs, or the reason why nothing is held out."""
    packed: bool
    """True if the data was packed into new shards."""
    account: Account = field(default_factory=Account)
    """All pairs of the data: used, or left out by cause."""
    notes: list[str] = field(default_factory=list)
    recognised: str = ""
    """One line: how a table was read. Empty: nothing had to be recognised."""


def patterns_of(data: Source) -> list[str]:
    """Every pattern of shards in the data, without weights.

    Raises:
        UserError: an entry is neither a pattern nor a source with `shards` and `weight`.
    """
    if isinstance(data, str | Path):
        return [str(data)]
    found: list[str] = []
    for entry in data:
        if isinstance(entry, str | Path):
            found.append(str(entry))
        else:
            shards = _source(entry).shards
            found += [shards] if isinstance(shards, str) else shards
    return found


def _source(entry: object) -> SourceConfig:
    try:
        return entry if isinstance(entry, SourceConfig) else SourceConfig.model_validate(entry)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise UserError(
            f"the data has the entry {str(entry)[:80]}: {where} {problem['msg'].lower()}; give patterns of shards, or "
            f"sources such as {{'shards': 'a/*.tar', 'weight': 2}}"
        ) from None


def is_shards(data: Source) -> bool:
    """True if the data are shards rather than a table or a folder of images."""
    if not isinstance(data, str | Path):
        return True
    path = Path(data)
    if path.is_dir():
        return bool(folder_shards(path))
    return table_suffix(path.name) is None


def prepare(
    data: Source,
    folder: Path,
    hold_out: bool = True,
    progress: Progress | None = None,
    *,
    table: Mapping[str, str] | None = None,
    limits: SampleLimits | None = None,
) -> Prepared:
    """Turn any data into shards. Images and tables are packed into the folder; packing can be resumed.

    Args:
        hold_out: hold out a fraction of the pairs for evaluation.
        progress: called with the number of packed records and the total.
        table: how to read a table: options of `open_records`.
        limits: limits and names of members of shards.

    Raises:
        UserError: the data are missing, damaged or too few, or would have to be packed by several processes.
    """
    if not is_shards(data):
        assert isinstance(data, str | Path)
        found = _packed(Path(data), folder, hold_out, progress, table or {})
    elif table:
        option, value = next(iter(table.items()))
        raise UserError(f"--{option.replace('_', '-')} {value} is for tables, but {_name(data)} names shards")
    elif any(not isinstance(entry, str | Path) for entry in ([] if isinstance(data, str | Path) else data)):
        found = _split_mixture(data, hold_out, limits or SampleLimits())
    else:
        found = _split_shards(patterns_of(data), hold_out, limits or SampleLimits())
    if found.pairs < LEAST:
        causes = "".join(f"; {cause}" for cause in found.account.causes())
        pairs = "1 usable pair" if found.pairs == 1 else f"{found.pairs} usable pairs"
        beside = f", besides {found.held_out_pairs} held out" if found.held_out_pairs else ""
        raise UserError(f"{_name(data)} has {pairs} to train on{beside}; give {LEAST} at least{causes}")
    return found


def resolve_shards(data: Source, folder: Path, need_captions: bool = True) -> list[str]:
    """Turn any data into shards without holding out pairs. Images and tables are packed into the folder.

    Args:
        need_captions: leave out images of a folder that have no caption. False: shards in `folder` that were packed of
            the data as they were before are replaced.

    Raises:
        UserError: the data are missing, damaged or empty, or would have to be packed by several processes.
    """
    if is_shards(data):
        return _expanded(data)
    assert isinstance(data, str | Path)
    if need_captions:
        return expand(_packed(Path(data), folder, False, None, {}).train)
    _refuse_several_processes(data)
    records, encoding = open_records(Path(data), need_captions=False), Encoding(resize=SIDE, need_captions=False)
    packed = pack(records, folder, encoding=encoding, replace=True)
    if packed.account.used == 0:
        raise UserError(f"no usable image in {data}: {packed.account.text()}")
    if packed.account.omitted:
        _log.warning("%s: %s", data, "; ".join(packed.account.causes()))
    return [str(path) for path in packed.shards[TRAIN]]


def _refuse_several_processes(source: str | Path) -> None:
    if system.world_size() > 1:
        raise UserError(
            f"{source} cannot be packed by several processes; run mmssl shards pack {source} --out DIR and give DIR"
        )


def held_out_fraction(pairs: int) -> float:
    """Fraction of the pairs to hold out: a tenth, at least 36 pairs, at most 5,000 and at most a quarter."""
    return min(0.25, min(5_000, max(36, pairs / 10)) / max(pairs, 1))


def _packed(
    source: Path, folder: Path, hold_out: bool, progress: Progress | None, table: Mapping[str, Any]
) -> Prepared:
    _refuse_several_processes(source)
    records = open_records(source, **table)
    number = len(records.keys())
    fraction = held_out_fraction(number) if hold_out else 0.0
    splits = {TRAIN: 1 - fraction, HELD_OUT: fraction} if hold_out else {TRAIN: 1.0}
    packed = pack(records, folder, splits=splits, encoding=Encoding(resize=SIDE), progress=progress)
    notes = []
    account = packed.account
    if account.omitted:
        notes.append(f"pairs left out are listed in {folder / BAD}")
    counts = {name: sum(_counts([str(path) for path in paths])) for name, paths in packed.shards.items()}
    if sum(counts.values()) == 0:
        raise UserError(f"no usable pair in {source}; {'; '.join(account.causes()) or 'it is empty'}")
    patterns = {name: f"{escape(str(folder))}/{name}-*.tar" for name, count in counts.items() if count > 0}
    held_out = counts.get(HELD_OUT, 0)
    return Prepared(
        train=patterns.get(TRAIN, ""),
        pairs=counts[TRAIN],
        held_out=patterns.get(HELD_OUT),
        held_out_pairs=held_out,
        why=f"{held_out:,} pairs, chosen by a hash of their keys, are held out from training",
        packed=True,
        account=account,
        notes=notes,
        recognised=records.describe(),
    )


def _expanded(data: Source) -> list[str]:
    """Expand patterns of shards. Raises UserError for a word that names no data at all."""
    if not isinstance(data, str | Path):
        return expand(patterns_of(data))
    if not (is_remote(str(data)) or has_magic(str(data)) or "{" in str(data) or Path(data).exists()):
        raise UserError(
            f"{data} does not exist; give a folder of images with captions, a table ({', '.join(TABLES)}) or shards "
            f"(the current folder is {Path.cwd()})"
        )
    return expand(str(data))


def _split_mixture(data: Source, hold_out: bool, limits: SampleLimits) -> Prepared:
    """Use the shards of a mixture without packing; some of each source are held out. Plain patterns are one source."""
    assert not isinstance(data, str | Path)
    plain = [str(entry) for entry in data if isinstance(entry, str | Path)]
    sources = [SourceConfig(shards=plain)] if plain else []
    sources += [_source(entry) for entry in data if not isinstance(entry, str | Path)]
    parts = [_split_shards(_listed(source.shards), hold_out, limits) for source in sources]
    held_out = [part.held_out for part in parts if part.held_out is not None]
    account = Account()
    for part in parts:
        account.include(part.account)
    return Prepared(
        train=[{"shards": part.train, "weight": source.weight} for part, source in zip(parts, sources, strict=True)],
        pairs=sum(part.pairs for part in parts),
        held_out=None if not held_out else held_out[0] if len(held_out) == 1 else f"{{{','.join(held_out)}}}",
        held_out_pairs=sum(part.held_out_pairs for part in parts),
        why="; ".join(f"source {number}: {part.why}" for number, part in enumerate(parts, start=1)),
        packed=False,
        account=account,
        notes=[note for part in parts for note in part.notes],
    )


def _listed(shards: str | list[str]) -> list[str]:
    return [shards] if isinstance(shards, str) else shards


def _split_shards(data: list[str], hold_out: bool, limits: SampleLimits) -> Prepared:
    """Use shards without packing; some of them are held out as a whole."""
    given = data[0] if len(data) == 1 else data
    names, apart = set_apart(_expanded(given), data)
    found = _indexes([*names, *apart], limits)
    counts = [index.samples for index in found]
    kept = apart or (_shards_to_hold_out(names, counts) if hold_out else [])
    held_out = sum(index.samples for index in found if index.shard in kept)
    if apart:
        why = f"{held_out:,} pairs in {len(apart)} shards of another split, such as {apart[0]}, are not trained on"
    elif kept:
        why = f"{held_out:,} pairs in {len(kept)} of {len(names)} shards, chosen by a hash, are held out from training"
        why += SAME_KIND if len(kept) < FEW_SHARDS else ""
    else:
        why = "none: holding out one of so few shards would remove more than a quarter of the pairs"
    problems = describe_problems(found)
    return Prepared(
        train=[name for name in names if name not in kept] if kept else given,
        pairs=sum(counts) - held_out,
        held_out=None if not kept else kept[0] if len(kept) == 1 else f"{{{','.join(kept)}}}",
        held_out_pairs=held_out,
        why=why,
        packed=False,
        account=account_of_indexes(found),
        notes=[] if problems is None else [problems],
    )


def _shards_to_hold_out(names: Sequence[str], counts: Sequence[int]) -> list[str]:
    """Choose shards to hold out by a hash of their names: the wanted fraction, at most a quarter of the pairs."""
    total, taken, kept = sum(counts), 0, []
    wanted = held_out_fraction(total) * total
    for name, count in sorted(zip(names, counts, strict=True), key=lambda pair: _hash(Path(pair[0]).name)):
        if taken >= wanted or taken + count > total / 4:
            break
        taken += count
        kept.append(name)
    return sorted(kept)


def _counts(shards: Sequence[str]) -> list[int]:
    """Number of usable pairs in each shard, from its index."""
    return [index.samples for index in _indexes(shards, SampleLimits())]


def _indexes(shards: Sequence[str], limits: SampleLimits) -> list[ShardIndex]:
    """The index of each shard."""
    found = index_source(shards, limits, Access())
    unknown = [shard for shard, index in zip(shards, found, strict=True) if index is None]
    if unknown:
        web = unknown[0].startswith(("http://", "https://"))
        where = "where the shards are stored, and copy the index beside them" if web else "once"
        raise UserError(
            f"{unknown[0]} has no index, so its pairs cannot be counted; run mmssl shards index PATTERN {where}, or "
            "train without: mmssl train CONFIG data.train=PATTERN train.steps=N"
        )
    return [index for index in found if index is not None]


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _name(data: Source) -> str:
    return ", ".join(patterns_of(data))
