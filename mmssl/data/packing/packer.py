"""Packing records into WebDataset shards: in parallel, and resumable shard by shard."""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Event, Lock
from typing import Any, Literal

import numpy as np
from PIL import Image

from mmssl.data.packing.records import MANIFEST, UNREADABLE, Fields, Images, RecordError, Records
from mmssl.data.packing.splits import Splits, divide, hash_of
from mmssl.data.shards import SampleLimits, image_ranges, index_shards
from mmssl.data.shards.account import Account
from mmssl.data.shards.causes import account_of_indexes, cause_of, remedy_of
from mmssl.data.transforms import DecodeError, captions, decoding, views
from mmssl.distributed import FolderLock
from mmssl.errors import UserError
from mmssl.files import read_json_lines

Bad = Sequence[tuple[str, RecordError | DecodeError]]
"""Key and error of each record that was left out."""
CopyFinder = Callable[[bytes], str | None]
"""From an encoded image to the key of the known image of which it is a copy."""
Format = Literal["keep", "jpeg", "png", "webp"]

BAD = "bad_samples.jsonl"
_PARTIAL = ".partial"
_LARGEST = SampleLimits().max_member_bytes
"""Bytes of a file, beyond which the index would leave out its sample."""
_REPEATED = "its key was used before"
_RENAME = "give each image a name of its own, with its caption under that name"
_EXTENSIONS = {"JPEG": "jpg", "TIFF": "tif", "JPEG2000": "jp2"}
"""Format -> extension, where they differ by more than case."""
_REENCODED = {"JPEG": "JPEG", "WEBP": "WEBP"}
"""Formats that a resized image keeps; all others become PNG."""


@dataclass(frozen=True)
class Encoding:
    """Image encoding in the shards."""

    resize: int | None = None
    """Shorter side in pixels to which larger images are shrunk. None: no limit."""
    format: Format = "keep"
    """`keep` copies the bytes of images that are not shrunk."""
    quality: int = 90
    """Quality of JPEG and WebP, 1 to 100."""
    max_pixels: int = decoding.MAX_PIXELS
    """Images with more pixels are left out."""
    need_captions: bool = field(default=True, repr=False)
    """Leave out images without a caption. False: they get no `.txt`."""


@dataclass(frozen=True)
class Exclusion:
    """Copies of images that are left out."""

    identity: str
    """What is left out, in words. A folder that was packed with another exclusion is refused."""
    finder: Callable[[Sequence[Path]], CopyFinder]
    """From the shards of the smaller splits, which are written first, to the finder for the next one."""


@dataclass
class Packed:
    """Result of a packing."""

    shards: dict[str, list[Path]] = field(default_factory=dict)
    """Split -> its shards."""
    counts: dict[str, int] = field(default_factory=dict)
    """Split -> number of samples in its shards."""
    samples: int = 0
    """Samples written by this call."""
    kept: int = 0
    """Shards that existed from an interrupted packing."""
    long_captions: int = 0
    """Samples of these with a caption that training refuses for its length, unless data.max_caption_chars is raised."""
    bad: list[tuple[str, str]] = field(default_factory=list)
    """Key and error of each record left out by this call."""
    account: Account = field(default_factory=Account)
    """All records of the source: in the shards, or left out as listed in bad_samples.jsonl."""


@dataclass(frozen=True)
class _ShardPlan:
    """One shard to write."""

    split: str
    path: Path
    records: Sequence[int]
    """Indices of its records, in order."""
    repeated: frozenset[int]
    """Those whose key already occurred."""


def pack(
    records: Records,
    out: Path,
    *,
    splits: Splits | None = None,
    shard_samples: int = 2000,
    encoding: Encoding | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    exclusion: Exclusion | None = None,
    group_by: str | None = None,
    replace: bool = False,
) -> Packed:
    """Write SPLIT-00000.tar, SPLIT-00001.tar ... and their index.

    A hash of its key decides the split of a record and its position there, so adding records moves no other record to
    another split. Records that share an image stay in one split. After an interruption, call this again to write the
    missing shards.

    Args:
        splits: name -> fraction of the records, or the field that names the split of each. Default: all in `train`.
        progress: called with the number of records done and the total.
        exclusion: copies to leave out.
        group_by: field whose equal values stay in one split, for example a patient or a product.
        replace: remove shards of other records, or of these records as they were before. False: refuse them.

    Raises:
        UserError: the folder contains shards of another packing, another process packs into it, or it cannot be
            written.
    """
    lock = FolderLock(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}; pick another folder") from None
    with lock:
        options = shard_samples, encoding or Encoding(), threads, progress, exclusion
        if replace:
            _remove_others(records, out)
        return _pack(records, out, splits, group_by, *options)


def _pack(
    records: Records,
    out: Path,
    splits: Splits | None,
    group_by: str | None,
    shard_samples: int,
    encoding: Encoding,
    threads: int | None,
    progress: Callable[[int, int], None] | None,
    exclusion: Exclusion | None,
) -> Packed:
    keys = records.keys()
    division = divide(records, keys, splits, group_by)
    shards = _plan_shards(keys, division.numbers, shard_samples, out, records.ordered)
    options = (*division.options, shard_samples, encoding, *([] if exclusion is None else [exclusion.identity]))
    fingerprint = _fingerprint(keys, options)
    _prepare(out, {"fingerprint": fingerprint, "content": records.identity()})
    for name in _mended(out, records, keys, encoding):
        (out / name).unlink()
    _forget_bad(out)
    missing = [shard for shard in shards if not shard.path.exists()]
    defects = [*records.defects(), *division.defects]
    packed = Packed(kept=len(shards) - len(missing), bad=[(place, str(error)) for place, error in defects])
    _list_bad(out, None, defects)
    counter = _Progress(len(keys) - sum(len(shard.records) for shard in missing), len(keys), progress)

    def work(shard: _ShardPlan, find: CopyFinder | None) -> None:
        written, long, bad = _write_shard(records, keys, shard, encoding, counter.tick, find)
        with counter.lock:
            packed.samples += written
            packed.long_captions += long
            packed.bad += [(key, str(error)) for key, error in bad]
            _finish(out, shard, written, bad)

    try:
        for part, find in _parts(shards, division.sizes, exclusion):
            _run_in_threads(partial(work, find=find), part, threads or os.cpu_count() or 1, counter.stopped)
    except OSError as error:
        raise UserError(
            f"{out} cannot be written: {error.strerror}; finished shards are kept, call again to continue"
        ) from None
    account = Account()
    for name in division.numbers:
        packed.shards[name] = [shard.path for shard in shards if shard.split == name and shard.path.exists()]
        found = _count(list(map(str, packed.shards[name])), encoding.need_captions)
        packed.counts[name] = found.used
        account.include(found)
    packed.account = _account(out, account)
    return packed


def _parts(
    shards: Sequence[_ShardPlan], sizes: Mapping[str, float], exclusion: Exclusion | None
) -> Iterator[tuple[list[_ShardPlan], CopyFinder | None]]:
    """Missing shards to write together: all, or with an exclusion a split at a time, the smallest first."""
    if exclusion is None:
        yield [shard for shard in shards if not shard.path.exists()], None
        return
    done: list[Path] = []
    for name in sorted(sizes, key=lambda name: sizes[name]):
        own = [shard for shard in shards if shard.split == name]
        missing = [shard for shard in own if not shard.path.exists()]
        if missing:
            yield missing, exclusion.finder(done)
        done += [shard.path for shard in own if shard.path.exists()]


def _count(shards: Sequence[str], need_captions: bool) -> Account:
    """The samples in shards: used, and left out by the index, as those with more bytes than a member may have."""
    if need_captions:
        return account_of_indexes(index_shards(shards, SampleLimits()))
    found = Account()
    for shard in shards:
        status = os.stat(shard)  # noqa: PTH116 - a name, not a path
        found.used += len(image_ranges(shard, status.st_mtime_ns, status.st_size))
    return found


def _account(out: Path, account: Account) -> Account:
    """The records in the shards, and those that were left out, by this call and by interrupted ones before it."""
    listed = _listed_bad(out)
    # Threads write shards in any order; what belongs to no shard is listed in the order of the source.
    for entry in sorted(listed, key=lambda entry: (entry["shard"], entry["key"]) if entry["shard"] else ("", "")):
        detail = entry["error"].removeprefix(entry["cause"]).removeprefix(": ")
        example = f"{entry['key']} ({detail})" if detail else entry["key"]
        account.leave_out(entry["cause"], example, remedy=entry["remedy"])
    return account


class _Progress:
    """Counts finished records over threads, and stops the threads."""

    def __init__(self, done: int, total: int, progress: Callable[[int, int], None] | None) -> None:
        self.lock = Lock()
        self.stopped = Event()
        self._done = done
        self._total = total
        self._progress = progress

    def tick(self) -> None:
        """Count one record. Raises CancelledError after `stopped` is set."""
        if self.stopped.is_set():
            raise CancelledError
        with self.lock:
            self._done += 1
            if self._progress is not None:
                self._progress(self._done, self._total)


def _run_in_threads(
    work: Callable[[_ShardPlan], None], shards: Sequence[_ShardPlan], threads: int, stopped: Event
) -> None:
    """Do the work for all shards. The first error stops the others, through `stopped`, and is raised."""
    failed: list[BaseException] = []

    def guarded(shard: _ShardPlan) -> None:
        if stopped.is_set():
            return
        try:
            work(shard)
        except BaseException as error:
            failed.append(error)
            stopped.set()

    with ThreadPoolExecutor(threads) as pool:
        try:
            list(pool.map(guarded, shards))
        except BaseException:
            stopped.set()
            raise
    if failed:
        raise failed[0]


def _plan_shards(
    keys: Sequence[str], parts: Mapping[str, list[int]], shard_samples: int, out: Path, ordered: bool
) -> list[_ShardPlan]:
    """The shards to write."""
    first: dict[str, int] = {}
    distinct = len(set(keys)) == len(keys)
    shards = []
    for name, own in parts.items():
        numbers = own
        if not ordered:  # shuffle records that can be read in any order
            places = np.fromiter((hash_of(f"order {keys[number]}") for number in own), np.uint64, len(own))
            numbers = np.array(own, np.int64)[np.argsort(places, kind="stable")].tolist()
        chunks = [numbers[start : start + shard_samples] for start in range(0, len(numbers), shard_samples)]
        for i, chunk in enumerate(chunks):
            again = () if distinct else (n for n in chunk if first.setdefault(keys[n], n) != n)
            repeated = frozenset(again)
            shards.append(_ShardPlan(name, out / f"{name}-{i:05}.tar", chunk, repeated))
    return shards


def _prepare(out: Path, manifest: dict[str, str]) -> None:
    """Prepare the folder for this packing; refuse one with shards of another packing.

    Args:
        manifest: fingerprints of the records and options, and of the content of the images and captions.
    """
    path = out / MANIFEST
    try:
        out.mkdir(parents=True, exist_ok=True)
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        other = known.get("fingerprint") != manifest["fingerprint"]
        if other and (known or any(out.glob("*.tar"))):
            raise UserError(f"{out} contains shards of other records or options; choose another folder, or remove them")
        if not other and known.get("content") != manifest["content"]:
            raise UserError(
                f"{out} contains shards of these records as they were before: images or captions changed since; "
                "choose another folder, or remove the shards to pack them again"
            )
        for left in out.glob(f"*{_PARTIAL}"):
            left.unlink()
        path.write_text(json.dumps(manifest), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}; pick another folder") from None


def _remove_others(records: Records, out: Path) -> None:
    """Remove the shards of a packing of other content."""
    path = out / MANIFEST
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if known and known.get("content") != records.identity():
        for old in (*out.glob("*.tar"), out / BAD, path):
            old.unlink(missing_ok=True)


def _mended(out: Path, records: Records, keys: Sequence[str], encoding: Encoding) -> set[str]:
    """Finished shards from which a record was left out that can be used now, for example as its file was restored."""
    entries = [entry for entry in _listed_bad(out) if entry["cause"] == UNREADABLE and entry["shard"] is not None]
    wanted = {entry["key"] for entry in entries}
    numbers: dict[str, int] = {}
    for place, key in enumerate(keys if wanted else ()):
        if key in wanted:
            numbers.setdefault(key, place)
    mended: set[str] = set()
    for entry in entries:
        shard, number = entry["shard"], numbers.get(entry["key"])
        if number is None or shard in mended or not (out / shard).exists():
            continue
        try:
            _members(*records.load(number), encoding)
        except (RecordError, DecodeError):
            continue
        mended.add(shard)
    return mended


def _listed_bad(out: Path) -> list[dict[str, Any]]:
    """The lines of bad_samples.jsonl that are whole."""
    needed = {"shard", "key", "error", "cause", "remedy"}
    return [row for row in read_json_lines(out / BAD).rows if needed <= row.keys()]


def _forget_bad(out: Path) -> None:
    """Keep the lines about finished shards: the records of missing ones will be listed again."""
    kept = [entry for entry in _listed_bad(out) if entry["shard"] is not None and (out / entry["shard"]).exists()]
    (out / BAD).write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in kept), encoding="utf-8")


def _fingerprint(keys: Sequence[str], options: tuple[object, ...]) -> str:
    digest = hashlib.blake2b(repr(options).encode(), digest_size=16)
    for key in keys:
        digest.update(key.encode() + b"\0")
    return digest.hexdigest()


def _write_shard(
    records: Records,
    keys: Sequence[str],
    shard: _ShardPlan,
    encoding: Encoding,
    tick: Callable[[], None],
    find: CopyFinder | None,
) -> tuple[int, int, Bad]:
    """Write one tar under its partial name.

    Returns:
        The number of samples, that of those with a caption too long for training, and the records left out.
    """
    written, long = 0, 0
    bad: list[tuple[str, RecordError | DecodeError]] = []
    with tarfile.open(_partial_path(shard.path), "w") as tar:
        for number in shard.records:
            key = keys[number]
            try:
                if number in shard.repeated:
                    raise RecordError(_REPEATED, remedy=_RENAME)
                images, fields = records.load(number)
                known = next(filter(None, map(find, images)), None) if find is not None else None
                if known is not None:
                    raise RecordError("its image is a copy of one in another split", known)
                members = _members(images, fields, encoding)
                for extension, content in members.items():
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
                written += 1
                long += _is_long(fields)
            except (RecordError, DecodeError) as error:
                bad.append((key, error))
            tick()
    return written, long, bad


def _is_long(fields: Fields) -> bool:
    """True if training refuses a caption for its length. A text of several lines is several captions."""
    text = str(fields["txt"])
    texts = captions.sample_captions({**fields, "txt": text}) if len(text) > captions.LONGEST else ()
    return any(captions.length_problem(caption) is not None for caption in texts)


def _finish(out: Path, shard: _ShardPlan, written: int, bad: Bad) -> None:
    """Record what is missing in a shard, then give it its final name. A shard without samples is deleted."""
    _list_bad(out, shard.path.name, bad)
    if written:
        _partial_path(shard.path).replace(shard.path)
    else:
        _partial_path(shard.path).unlink()


def _list_bad(out: Path, shard: str | None, bad: Bad) -> None:
    """Add records to bad_samples.jsonl. None: they were left out before the records were distributed to shards."""
    with (out / BAD).open("a", encoding="utf-8", errors="backslashreplace") as file:
        for key, error in bad:
            if isinstance(error, RecordError):
                cause, remedy = error.cause, error.remedy
            else:
                cause, remedy = cause_of(str(error)), remedy_of(str(error))
            entry = {"shard": shard, "key": key, "error": str(error), "cause": cause, "remedy": remedy}
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def _partial_path(path: Path) -> Path:
    return path.with_name(path.name + _PARTIAL)


def _members(images: Images, fields: Fields, encoding: Encoding) -> dict[str, bytes]:
    """Extension -> content of one sample.

    Raises:
        DecodeError: the image cannot be decoded.
        RecordError: the caption is empty or no text, or the image is too large for its format.
    """
    caption = str(fields["txt"]).strip()
    if not caption and encoding.need_captions:
        raise RecordError("the caption is empty", remedy="write a caption")
    if "\0" in caption:
        raise RecordError(captions.NULLS, remedy=remedy_of(captions.NULLS))
    encoded = [_encode_image(image, encoding) for image in images]
    numbered = {f"{number}.{extension}": content for number, (extension, content) in enumerate(encoded)}
    members = dict(encoded) if len(encoded) == 1 else numbered
    members |= {"txt": caption.encode("utf-8", "replace")} if caption else {}
    others = {name: value for name, value in fields.items() if name != "txt"}
    if others:
        members["json"] = json.dumps(others, ensure_ascii=False).encode("utf-8", "replace")
    largest = max(members, key=lambda extension: len(members[extension]))
    if len(members[largest]) > _LARGEST:
        detail = f".{largest} has {len(members[largest])} bytes, more than {_LARGEST}"
        raise RecordError("a file has more bytes than a sample may", detail, "shrink the image: --resize 512")
    return members


def _extension(format: str) -> str:
    return _EXTENSIONS.get(format, format.lower())


def _encode_image(image: bytes, encoding: Encoding) -> tuple[str, bytes]:
    """Extension and bytes of an image. It is always decoded, so broken images are found."""
    header = decoding.read_header(image, encoding.max_pixels)
    side = encoding.resize
    shrink = side is not None and min(header.width, header.height) > side
    wanted = header.format if encoding.format == "keep" else encoding.format.upper()
    if not shrink and wanted == header.format:
        decoding.decode(image, header, max(decoding.REDUCTIONS))
        return _extension(header.format), image
    pixels = views.shrink(image, header, side) if side is not None and shrink else decoding.decode(image, header)
    wanted = wanted if encoding.format != "keep" else _REENCODED.get(wanted, "PNG")
    buffer = io.BytesIO()
    try:
        Image.fromarray(pixels).save(buffer, wanted, quality=encoding.quality)
    except (OSError, ValueError) as error:
        raise RecordError(f"it cannot be written as {wanted}", str(error), "choose another --format") from None
    return _extension(wanted), buffer.getvalue()
