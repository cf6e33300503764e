"""Preparation of data in any form as shards, split into training and held-out pairs."""

import hashlib
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from glob import escape, has_magic
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mmssl import system
from mmssl.config import HoldOutConfig, SourceConfig
from mmssl.data import Account, expand
from mmssl.data.packing import BAD, Encoding, open_records, pack, table_suffix
from mmssl.data.shards import TABLES, Progress, SampleLimits, ShardIndex, describe_problems, is_remote
from mmssl.data.sources import account_of_indexes, folder_shards, hold_out, index_source, set_apart
from mmssl.data.storage import Access
from mmssl.errors import UserError
from mmssl.files import open_regular

_log = logging.getLogger(__name__)
LEAST = 8
"""Minimum number of training pairs."""
SIDE = 512
"""Shorter side in pixels of packed images: decoding large photographs in every epoch would take longer than training
on them."""
MOST_KEYS = 1_000_000
"""Pairs beyond which shards are held out as a whole: reading the keys of all takes 30 to 40 s at every start."""
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
    rule: HoldOutConfig = field(default_factory=HoldOutConfig)
    """Value for `data.hold_out`: the pairs of the training shards that are held out."""


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
    rule: HoldOutConfig | None = None,
    progress: Progress | None = None,
    *,
    table: Mapping[str, str] | None = None,
    limits: SampleLimits | None = None,
) -> Prepared:
    """Turn any data into shards. Images and tables are packed into the folder; packing can be resumed. Of local
    shards the held-out pairs are copied there.

    Args:
        rule: the pairs to hold out for evaluation. A share that is not set is `held_out_fraction`.
        progress: called with the number of packed records and the total.
        table: how to read a table: options of `open_records`.
        limits: limits and names of members of shards.

    Raises:
        UserError: the data are missing, damaged or too few, or would have to be packed by several processes.
    """
    rule = rule or HoldOutConfig()
    if not is_shards(data):
        assert isinstance(data, str | Path)
        found = _packed(Path(data), folder, rule, progress, table or {})
    elif table:
        option, value = next(iter(table.items()))
        raise UserError(f"--{option.replace('_', '-')} {value} is for tables, but {_name(data)} names shards")
    else:
        found = _split(data, folder, rule, limits or SampleLimits())
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
        return expand(_packed(Path(data), folder, HoldOutConfig(share=0), None, {}).train)
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


def _share(rule: HoldOutConfig, pairs: int) -> float:
    return rule.share if "share" in rule.model_fields_set else float(f"{held_out_fraction(pairs):.3g}")


def _packed(
    source: Path, folder: Path, rule: HoldOutConfig, progress: Progress | None, table: Mapping[str, Any]
) -> Prepared:
    _refuse_several_processes(source)
    records = open_records(source, **table)
    number = len(records.keys())
    share = _share(rule, number)
    splits = {TRAIN: 1 - share, HELD_OUT: share} if share > 0 else {TRAIN: 1.0}
    packed = pack(
        records, folder, splits=splits, encoding=Encoding(resize=SIDE), progress=progress, group_by=rule.group
    )
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
        why=_by_hash(held_out, rule),
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


@dataclass(frozen=True)
class _ShardSource:
    """One source of shards."""

    source: SourceConfig
    indexes: list[ShardIndex]
    apart: list[ShardIndex]
    """Shards of another split beside them, which are not trained on."""

    @classmethod
    def of(cls, source: SourceConfig, limits: SampleLimits) -> "_ShardSource":
        """Index the shards of a source."""
        given = [source.shards] if isinstance(source.shards, str) else source.shards
        names, apart = set_apart(_expanded(given[0] if len(given) == 1 else given), given)
        found = _indexes([*names, *apart], limits)
        return cls(source, found[: len(names)], found[len(names) :])

    def without(self, held_out: Collection[str]) -> str | list[str]:
        """Patterns of the shards to train on, if those are held out as a whole."""
        left = [index.shard for index in self.indexes if index.shard not in held_out]
        return left if self.apart or len(left) < len(self.indexes) else self.source.shards


def _split(data: Source, folder: Path, rule: HoldOutConfig, limits: SampleLimits) -> Prepared:
    """Use shards without packing, and hold out some pairs: shards of another split that lie beside them, else the pairs
    that the rule chooses. Of remote shards, and of very many pairs, whole shards are held out."""
    entries = [data] if isinstance(data, str | Path) else list(data)
    plain = [str(entry) for entry in entries if isinstance(entry, str | Path)]
    weighted = [_source(entry) for entry in entries if not isinstance(entry, str | Path)]
    sources = [SourceConfig(shards=plain[0] if len(plain) == 1 else plain)] if plain or not weighted else []
    parts = [_ShardSource.of(source, limits) for source in [*sources, *weighted]]
    indexes = [index for part in parts for index in part.indexes]
    apart = [index for part in parts for index in part.apart]
    rule = rule.model_copy(update={"share": _share(rule, _pairs(indexes))})
    chosen, kept, pattern = HoldOutConfig(), list[ShardIndex](), None
    if apart:
        kept = apart
        where = f"{len(kept)} shards of another split, such as {kept[0].shard}"
        why = f"{_pairs(kept):,} pairs in {where}, are not trained on"
    elif rule.share == 0:
        why = "none: data.hold_out.share=0"
    elif _pairs(indexes) <= MOST_KEYS and not any(is_remote(index.shard) for index in indexes):
        chosen, kept = rule, hold_out(indexes, rule)[1]
        if copy_samples(kept, folder, HELD_OUT):
            pattern, why = f"{escape(str(folder))}/{HELD_OUT}-*.tar", _by_hash(_pairs(kept), rule)
        else:
            why = f"none: a fraction of {rule.share:g} chose none of so few; set data.hold_out.share"
    else:
        kept = [index for part in parts for index in _shards_to_hold_out(part.indexes, rule.share)]
        why = f"{_pairs(kept):,} pairs in {len(kept)} of {len(indexes)} shards, chosen by a hash, are held out"
        if not kept:
            why = "none: holding out one of so few shards would remove more than a quarter of the pairs"
    whole = [] if chosen.share else [index.shard for index in kept]
    if whole:
        pattern = whole[0] if len(whole) == 1 else f"{{{','.join(whole)}}}"
    used = [part.without(whole) for part in parts]
    every = [*indexes, *apart]
    problems = describe_problems(every)
    return Prepared(
        train=[{"shards": shards, "weight": part.source.weight} for shards, part in zip(used, parts, strict=True)]
        if weighted
        else used[0],
        pairs=_pairs(indexes) - (0 if apart else _pairs(kept)),
        held_out=pattern,
        held_out_pairs=_pairs(kept),
        why=why,
        packed=False,
        account=account_of_indexes(every),
        notes=[] if problems is None else [problems],
        rule=chosen,
    )


def _by_hash(pairs: int, rule: HoldOutConfig) -> str:
    """One line about pairs that are held out."""
    what = "keys" if rule.group is None else f"{rule.group}"
    return f"{pairs:,} pairs, chosen by a hash of their {what}, are held out from training"


def _pairs(indexes: Sequence[ShardIndex]) -> int:
    return sum(index.samples for index in indexes)


def _shards_to_hold_out(indexes: Sequence[ShardIndex], share: float) -> list[ShardIndex]:
    """Choose shards to hold out by a hash of their names: the wanted fraction, at most a quarter of the pairs."""
    total, kept = _pairs(indexes), list[ShardIndex]()
    for index in sorted(indexes, key=lambda index: _hash(Path(index.shard).name)):
        if _pairs(kept) >= share * total or _pairs(kept) + index.samples > total / 4:
            break
        kept.append(index)
    return sorted(kept, key=lambda index: index.shard)


def copy_samples(indexes: Sequence[ShardIndex], folder: Path, name: str) -> list[Path]:
    """Copy the usable samples of local shards byte for byte, each shard's into one: FOLDER/NAME-00000.tar, ...

    Several processes may do so at once. Other tars of this name are removed.

    Raises:
        UserError: a shard cannot be read, or the folder cannot be written.
    """
    used = [index for index in indexes if index.samples > 0]
    written = [folder / f"{name}-{number:05}.tar" for number in range(len(used))]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for index, path in zip(used, written, strict=True):
            partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
            with open_regular(index.shard) as file, partial.open("wb") as out:
                for start, stop in zip(*index.ranges(), strict=True):
                    file.seek(start)
                    out.write(file.read(stop - start))
                out.write(bytes(1024))  # the end of a tar
            partial.replace(path)
        for other in set(folder.glob(f"{name}-*.tar")) - set(written):
            other.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"the held-out samples cannot be copied to {folder}: {error.strerror}") from None
    return written


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
