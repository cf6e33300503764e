"""What it takes to open large sources: a folder of many files, and a table of many rows."""

import contextlib
import itertools
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mmssl.data.packing import open_records, pack
from mmssl.system import peak_memory

_FOLDERS = 100


@dataclass(frozen=True)
class Opening:
    """The cost of opening one source and planning its shards, in a process of its own."""

    what: str
    records: int
    first_report: float
    """Seconds to the first report of progress."""
    longest_silence: float
    """Longest time without a report, in seconds, up to the end of the opening."""
    open_seconds: float
    """Seconds to open the source: to list the folder, or to read the table."""
    plan_seconds: float
    """Seconds from there to the first record that is packed: keys, owners, splits and shards."""
    extra_bytes: int
    """Peak memory above that of the process before."""


def bench_sources(files: int, rows: int) -> str:
    """Measure a folder of `files` files, half of them images, and a table of `rows` rows. Returns a table as text."""
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for write, count in ((_write_folder, files), (_write_table, rows)):
            source = write(folder, count)
            # Unlike multiprocessing's pool, this one notices a process that was killed for its memory.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                found.append(pool.submit(_open, source).result())
    lines = [f"{'':32} {'first report':>13} {'silence':>8} {'opened':>8} {'planned':>8} {'extra MB':>9}"]
    lines += [
        f"{f'{one.what}, {one.records:,} records':32} {one.first_report:12.2f}s {one.longest_silence:7.2f}s "
        f"{one.open_seconds:7.1f}s {one.plan_seconds:7.1f}s {one.extra_bytes / 1e6:9.0f}"
        for one in found
    ]
    return "\n".join(lines)


class _StopError(Exception):
    """Ends a packing at its first record."""


def _stop(done: int, total: int) -> None:
    raise _StopError


def _open(source: Path) -> Opening:
    before, start = peak_memory(), time.perf_counter()
    reports: list[float] = []
    records = open_records(source, progress=lambda done: reports.append(time.perf_counter() - start))
    opened = time.perf_counter() - start
    with contextlib.suppress(_StopError):
        pack(records, source.with_name(f"{source.name}-packed"), threads=1, progress=_stop)
    planned = time.perf_counter() - start - opened
    moments = [0.0, *reports, opened]
    silence = max(later - earlier for earlier, later in itertools.pairwise(moments))
    what = "folder" if source.is_dir() else "table"
    first = reports[0] if reports else opened
    return Opening(what, len(records.keys()), first, silence, opened, planned, peak_memory() - before)


def _write_folder(root: Path, files: int) -> Path:
    """A folder of `files` files in subfolders: images, which are not read here, and captions."""
    for number in range(files // 2):
        place = root / "folder" / f"{number % _FOLDERS:03}"
        if number < _FOLDERS:
            place.mkdir(parents=True)
        (place / f"{number:08}.jpg").touch()
        (place / f"{number:08}.txt").write_text(f"a caption of number {number}")
    return root / "folder"


def _write_table(root: Path, rows: int) -> Path:
    """A CSV of `rows` rows with five captions of each image, as Flickr30k's."""
    with (root / "table.csv").open("w", encoding="utf-8") as file:
        file.write("image,caption,split\n")
        file.writelines(
            f'images/{row // 5:09}.jpg,"a caption of the usual length, of number {row}",train\n' for row in range(rows)
        )
    return root / "table.csv"
