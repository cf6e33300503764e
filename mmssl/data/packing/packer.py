"""Images with captions into WebDataset shards: in parallel, and resumable shard by shard."""

import hashlib
import io
import json
import math
import os
import tarfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock
from typing import Literal

from PIL import Image

from mmssl.data.packing.record import Fields, RecordError, Records
from mmssl.data.shards.index import index_shards
from mmssl.data.shards.samples import SampleLimits
from mmssl.data.transforms import DecodeError, decoding, views
from mmssl.errors import UserError

Bad = list[tuple[str, str]]
"""Key and reason of each record that was left out."""
Format = Literal["keep", "jpeg", "png", "webp"]

MANIFEST = "mmssl-pack.json"
BAD = "bad_samples.jsonl"
_PARTIAL = ".partial"
_EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}
_REENCODED = {"JPEG": "JPEG", "WEBP": "WEBP"}
"""A resized image that keeps its format; all others become PNG."""


@dataclass(frozen=True)
class Encoding:
    """What becomes of the images' bytes."""

    resize: int | None = None
    """Larger images are shrunk so that their shorter side has so many pixels."""
    format: Format = "keep"
    """`keep` leaves the bytes of images that are not shrunk as they are."""
    quality: int = 90
    """Of JPEG and WebP, 1 to 100."""
    max_pixels: int = decoding.MAX_PIXELS
    """Larger images are refused."""


@dataclass
class Packed:
    """What a packing did."""

    shards: dict[str, list[Path]] = field(default_factory=dict)
    """Split -> its shards."""
    counts: dict[str, int] = field(default_factory=dict)
    """Split -> samples of its shards."""
    samples: int = 0
    """Samples written now."""
    kept: int = 0
    """Shards that stood there from an interrupted packing."""
    bad: Bad = field(default_factory=list)
    """What was left out now; the file bad_samples.jsonl has it of all runs."""


@dataclass(frozen=True)
class _Job:
    """One shard to write."""

    split: str
    path: Path
    numbers: Sequence[int]


def pack(
    records: Records,
    out: Path,
    *,
    splits: Mapping[str, float] | None = None,
    shard_samples: int = 2000,
    encoding: Encoding | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Packed:
    """Write SPLIT-00000.tar, SPLIT-00001.tar ... and their index.

    A record belongs to a split, and stands in its place there, by a hash of its key: adding records moves no other to
    another split. Records of one image follow the first of them. Called again after an interruption it goes on with
    the shards that are missing.

    Args:
        splits: name -> share of the records; by default all are `train`.
        progress: called with the records done and their number.

    Raises:
        UserError: the folder holds shards of another packing, or cannot be written.
    """
    encoding, splits, keys = encoding or Encoding(), dict(splits or {"train": 1.0}), records.keys()
    jobs = _plan(records, keys, splits, shard_samples, out)
    options = (records.identity(), sorted(splits.items()), shard_samples, encoding)
    _prepare(out, _fingerprint(keys, options), {job.path.name for job in jobs})
    missing = [job for job in jobs if not job.path.exists()]
    packed = Packed(kept=len(jobs) - len(missing))
    pace = _Pace(len(keys) - sum(len(job.numbers) for job in missing), len(keys), progress)

    def work(job: _Job) -> None:
        written, bad = _write_shard(records, keys, job, encoding, pace.tick)
        with pace.lock:
            packed.samples += written
            packed.bad += bad
            _finish(out, job, written, bad)

    try:
        _in_threads(work, missing, threads or os.cpu_count() or 1, pace.stopped)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}; what is done stays, call again to go on") from None
    for name in splits:
        packed.shards[name] = [job.path for job in jobs if job.split == name and job.path.exists()]
        packed.counts[name] = sum(i.samples for i in index_shards(list(map(str, packed.shards[name])), SampleLimits()))
    return packed


class _Pace:
    """Counts the records that threads have done, and stops the threads."""

    def __init__(self, done: int, total: int, progress: Callable[[int, int], None] | None) -> None:
        self.lock = Lock()
        self.stopped = Event()
        self._done = done
        self._total = total
        self._progress = progress

    def tick(self) -> None:
        """One more is done. Raises CancelledError when it is time to stop."""
        if self.stopped.is_set():
            raise CancelledError
        with self.lock:
            self._done += 1
            if self._progress is not None:
                self._progress(self._done, self._total)


def _in_threads(work: Callable[[_Job], None], jobs: Sequence[_Job], threads: int, stopped: Event) -> None:
    """Do all jobs. The first error stops the others, by `stopped`, and is raised."""
    failed: list[BaseException] = []

    def guarded(job: _Job) -> None:
        if stopped.is_set():
            return
        try:
            work(job)
        except BaseException as error:
            failed.append(error)
            stopped.set()

    with ThreadPoolExecutor(threads) as pool:
        try:
            list(pool.map(guarded, jobs))
        except BaseException:
            stopped.set()
            raise
    if failed:
        raise failed[0]


def _plan(
    records: Records, keys: Sequence[str], splits: Mapping[str, float], shard_samples: int, out: Path
) -> list[_Job]:
    """The shards to write. Records whose key came before are marked by a negative number, -1 - number."""
    first: dict[str, int] = {}
    jobs = []
    for name, numbers in _numbers_of_splits(records.owners(), splits).items():
        if not records.ordered:  # mix them, where they can be read in any order
            numbers.sort(key=lambda number: (_hash(f"order {keys[number]}"), number))
        marked = [n if first.setdefault(keys[n], n) == n else -1 - n for n in numbers]
        chunks = [marked[start : start + shard_samples] for start in range(0, len(marked), shard_samples)]
        jobs += [_Job(name, out / f"{name}-{i:05}.tar", chunk) for i, chunk in enumerate(chunks)]
    return jobs


def _numbers_of_splits(keys: Sequence[str], splits: Mapping[str, float]) -> dict[str, list[int]]:
    """Record numbers of each split."""
    total = sum(splits.values())
    if not 0 < total < math.inf or min(splits.values()) < 0:
        raise UserError(f"the shares of the splits {dict(splits)} must be positive numbers")
    found: dict[str, list[int]] = {name: [] for name in splits}
    for number, key in enumerate(keys):
        place, end = _hash(key) / 2**64 * total, 0.0
        for name, share in splits.items():
            end += share
            if place < end:
                found[name].append(number)
                break
    return found


def _prepare(out: Path, fingerprint: str, shards: set[str]) -> None:
    """Make the folder ready for this packing, and for no other."""
    manifest, bad = out / MANIFEST, out / BAD
    try:
        out.mkdir(parents=True, exist_ok=True)
        known = json.loads(manifest.read_text(encoding="utf-8")).get("fingerprint") if manifest.exists() else None
        if known != fingerprint and (known is not None or any(out.glob("*.tar"))):
            raise UserError(f"{out} holds shards of other records or options; choose another folder, or remove them")
        for left in out.glob(f"*{_PARTIAL}"):
            left.unlink()
        manifest.write_text(json.dumps({"fingerprint": fingerprint}), encoding="utf-8")
        if bad.exists():  # what is written again is found again
            lines = bad.read_text(encoding="utf-8").splitlines(keepends=True)
            standing = {name for name in shards if (out / name).exists()}
            bad.write_text("".join(line for line in lines if json.loads(line)["shard"] in standing), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}; pick another folder") from None


def _fingerprint(keys: Sequence[str], options: tuple[object, ...]) -> str:
    digest = hashlib.blake2b(repr(options).encode(), digest_size=16)
    for key in keys:
        digest.update(key.encode() + b"\0")
    return digest.hexdigest()


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _write_shard(
    records: Records, keys: Sequence[str], job: _Job, encoding: Encoding, tick: Callable[[], None]
) -> tuple[int, Bad]:
    """Write one tar under a passing name. Returns the samples written and what was left out."""
    written, bad = 0, []
    with tarfile.open(_passing(job.path), "w") as tar:
        for number in job.numbers:
            key = keys[number if number >= 0 else -1 - number]
            try:
                if number < 0:
                    raise RecordError("its key was used before")
                members = _members(*records.load(number), encoding)
                for extension, content in members.items():
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
                written += 1
            except (RecordError, DecodeError) as error:
                bad.append((key, str(error)))
            tick()
    return written, bad


def _finish(out: Path, job: _Job, written: int, bad: Bad) -> None:
    """Give a shard its name; note first what is missing in it. A shard without samples is not kept."""
    with (out / BAD).open("a", encoding="utf-8") as file:
        for key, error in bad:
            record = {"shard": job.path.name, "key": key, "error": error}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    if written:
        _passing(job.path).replace(job.path)
    else:
        _passing(job.path).unlink()


def _passing(path: Path) -> Path:
    return path.with_name(path.name + _PARTIAL)


def _members(image: bytes, fields: Fields, encoding: Encoding) -> dict[str, bytes]:
    """Extension -> content of one sample.

    Raises:
        DecodeError: the image cannot be decoded.
        RecordError: the caption is empty, or the image too large for its format.
    """
    caption = str(fields["txt"]).strip()
    if not caption:
        raise RecordError("the caption is empty")
    extension, content = _image(image, encoding)
    members = {extension: content, "txt": caption.encode("utf-8", "replace")}
    others = {name: value for name, value in fields.items() if name != "txt"}
    if others:
        members["json"] = json.dumps(others, ensure_ascii=False).encode("utf-8", "replace")
    return members


def _image(image: bytes, encoding: Encoding) -> tuple[str, bytes]:
    """Extension and bytes of an image, which has been decoded at least once."""
    header = decoding.read_header(image, encoding.max_pixels)
    short, side = min(header.width, header.height), encoding.resize
    shrink = side is not None and short > side
    wanted = header.format if encoding.format == "keep" else encoding.format.upper()
    if not shrink and wanted == header.format:
        decoding.decode(image, header, max(decoding.REDUCTIONS))
        return _EXTENSIONS[header.format], image
    pixels = decoding.decode(
        image, header, views.dct_reduction(header, short / side, "quality") if side is not None else 1
    )
    if shrink:
        assert side is not None
        height, width = (max(1, round(length * side / short)) for length in (header.height, header.width))
        pixels = views.resize(pixels, height, width).permute(1, 2, 0).contiguous().numpy()
    wanted = wanted if encoding.format != "keep" else _REENCODED.get(wanted, "PNG")
    buffer = io.BytesIO()
    try:
        Image.fromarray(pixels).save(buffer, wanted, quality=encoding.quality)
    except (OSError, ValueError) as error:
        raise RecordError(f"it cannot be written as {wanted}: {error}") from None
    return _EXTENSIONS[wanted], buffer.getvalue()
