"""Pairs in any form to shards: those that are trained on, and a part held out to judge by."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from glob import escape, has_magic
from pathlib import Path

from mmssl import system
from mmssl.data import expand
from mmssl.data.packing import BAD, Encoding, open_records, pack
from mmssl.data.shards import TABLES, Progress, SampleLimits, is_remote
from mmssl.data.sources import index_source
from mmssl.data.storage import Access
from mmssl.errors import UserError

LEAST = 8
"""Pairs without which there is nothing to learn."""
SIDE = 512
"""Packed images are shrunk to so many pixels on the shorter side: decoding large photographs again in every epoch
would take longer than learning from them."""
TRAIN, HELD_OUT = "train", "held-out"

Source = str | Path | Sequence[str]
"""A folder of images with captions, a table, or shards: a folder, a pattern or a list of patterns."""


@dataclass(frozen=True)
class Prepared:
    """Pairs as shards."""

    train: str | list[str]
    """What `data.train` takes."""
    pairs: int
    held_out: str | None
    """Pattern of the shards to judge by; None: there are none."""
    held_out_pairs: int
    why: str
    """How the part was held out, or why not."""
    packed: bool
    """Whether the shards were made here."""
    notes: list[str] = field(default_factory=list)


def is_shards(data: Source) -> bool:
    """Whether data are shards already, and neither a table nor a folder of images."""
    if not isinstance(data, str | Path):
        return True
    path = Path(data)
    return any(path.glob("*.tar")) if path.is_dir() else path.suffix not in TABLES


def prepare(data: Source, folder: Path, hold_out: bool = True, progress: Progress | None = None) -> Prepared:
    """Shards of any data. Images and tables are packed into the folder; interrupted, that goes on where it was.

    Args:
        hold_out: keep a part away from training.
        progress: called with the records packed and their number.

    Raises:
        UserError: the data are missing, damaged or too few, or would have to be packed by several processes.
    """
    if not is_shards(data):
        assert isinstance(data, str | Path)
        found = _packed(Path(data), folder, hold_out, progress)
    else:
        found = _as_they_are(data, hold_out)
    if found.pairs < LEAST:
        raise UserError(f"{_name(data)} has {found.pairs} usable pairs to train on; give {LEAST} at least")
    return found


def resolve_shards(data: Source, folder: Path) -> list[str]:
    """All pairs of any data as shards; images and tables are packed into the folder.

    Raises:
        UserError: the data are missing, damaged or empty, or would have to be packed by several processes.
    """
    if is_shards(data):
        return _expanded(data)
    assert isinstance(data, str | Path)
    return expand(_packed(Path(data), folder, False, None).train)


def held_out_share(pairs: int) -> float:
    """The part of the pairs that is held out: a tenth, but three dozens at least, 5,000 at most and never more than a
    quarter."""
    return min(0.25, min(5_000, max(36, pairs / 10)) / max(pairs, 1))


def _packed(source: Path, folder: Path, hold_out: bool, progress: Progress | None) -> Prepared:
    if system.world_size() > 1:
        raise UserError(f"one process packs: mmssl shards pack {source} --out DIR; then give DIR to all processes")
    records = open_records(source)
    number = len(records.keys())
    share = held_out_share(number) if hold_out else 0.0
    splits = {TRAIN: 1 - share, HELD_OUT: share} if hold_out else {TRAIN: 1.0}
    packed = pack(records, folder, splits=splits, encoding=Encoding(resize=SIDE), progress=progress)
    notes = []
    if packed.bad:
        key, why = packed.bad[0]
        notes.append(f"{len(packed.bad)} of {number:,} left out, named in {folder / BAD}; first: {key}: {why}")
    counts = {name: sum(_counts([str(path) for path in paths])) for name, paths in packed.shards.items()}
    if sum(counts.values()) == 0:
        raise UserError(f"no pair of {source} can be used; {notes[0] if notes else 'it is empty'}")
    patterns = {name: f"{escape(str(folder))}/{name}-*.tar" for name, count in counts.items() if count > 0}
    held_out = counts.get(HELD_OUT, 0)
    return Prepared(
        train=patterns.get(TRAIN, ""),
        pairs=counts[TRAIN],
        held_out=patterns.get(HELD_OUT),
        held_out_pairs=held_out,
        why=f"{held_out:,} pairs, drawn by a hash of their keys, are never trained on",
        packed=True,
        notes=notes,
    )


def _expanded(data: Source) -> list[str]:
    """The names of shards; a word that could mean other data too is said to mean none of them."""
    if not isinstance(data, str | Path):
        return expand(data)
    if not (is_remote(str(data)) or has_magic(str(data)) or "{" in str(data) or Path(data).exists()):
        raise UserError(
            f"{data} does not exist; give a folder of images with captions, a table ({', '.join(TABLES)}) or shards "
            f"(the current folder is {Path.cwd()})"
        )
    return expand(str(data))


def _as_they_are(data: Source, hold_out: bool) -> Prepared:
    """Shards stay whole: a held-out part is some of them."""
    names = _expanded(data)
    counts = _counts(names)
    kept = _shards_to_hold_out(names, counts) if hold_out else []
    held_out = sum(count for name, count in zip(names, counts, strict=True) if name in kept)
    if kept:
        why = f"{held_out:,} pairs in {len(kept)} of {len(names)} shards, drawn by a hash, are never trained on"
    else:
        why = "none: holding out one of so few shards would take more than a quarter of the pairs"
    whole = str(data) if isinstance(data, str | Path) else list(data)
    return Prepared(
        train=[name for name in names if name not in kept] if kept else whole,
        pairs=sum(counts) - held_out,
        held_out=None if not kept else kept[0] if len(kept) == 1 else f"{{{','.join(kept)}}}",
        held_out_pairs=held_out,
        why=why,
        packed=False,
    )


def _shards_to_hold_out(names: Sequence[str], counts: Sequence[int]) -> list[str]:
    """As many as hold the share, in the order of a hash of their file names; never more than a quarter of the pairs."""
    total, taken, kept = sum(counts), 0, []
    wanted = held_out_share(total) * total
    for name, count in sorted(zip(names, counts, strict=True), key=lambda pair: _hash(Path(pair[0]).name)):
        if taken >= wanted or taken + count > total / 4:
            break
        taken += count
        kept.append(name)
    return sorted(kept)


def _counts(shards: Sequence[str]) -> list[int]:
    """Usable pairs of each shard, from its index."""
    found = index_source(shards, SampleLimits(), Access())
    unknown = [shard for shard, index in zip(shards, found, strict=True) if index is None]
    if unknown:
        raise UserError(f"{unknown[0]} has no index, so its pairs cannot be counted: mmssl shards index PATTERN")
    return [index.samples for index in found if index is not None]


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _name(data: Source) -> str:
    return str(data) if isinstance(data, str | Path) else ", ".join(data)
