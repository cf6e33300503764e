"""Remote bytes arrive right or not at all: every kind of failure is taken up again, or ends in one clear
line."""

import pickle
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import fsspec
import numpy as np
import pytest

from mmssl.data.storage import Fetcher, RetryPolicy, list_fsspec
from mmssl.data.storage.http import RemoteFileMissingError
from mmssl.errors import UserError
from tests.helpers.http_servers import Mischief, serve

PATIENT = RetryPolicy(tries=20, backoff_seconds=0.01, stall_seconds=0.5)
SHORT = RetryPolicy(tries=4, backoff_seconds=0.01, stall_seconds=0.5)
CONTENT = np.random.default_rng(0).bytes(300_000)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one large file."""
    (tmp_path / "x.tar").write_bytes(CONTENT)
    return tmp_path


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"fail": 3},
        {"fail": 2, "status": 429, "retry_after": "0"},
        {"fail": 1, "status": 522},
        {"cut": 3},
        {"cut": 3, "cut_after": 0},
        {"cut": 2, "cut_after": 90_000},
        {"stall": 1},
        {"stall": 1, "cut_after": 0},
        {"drip": 1},
        {"no_tags": True, "cut": 1},
        {"fail": 1, "cut": 1, "stall": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize(("start", "stop"), [(0, 300_000), (1000, 200_000), (299_999, 300_000)])
def test_passing_failures_end_in_the_right_bytes(folder: Path, wrong: dict[str, int], start: int, stop: int) -> None:
    """Errors, early ends, stalls and drips are taken up at the byte reached; what arrives is what was asked
    for."""
    mischief, fetcher = Mischief(**wrong), Fetcher(PATIENT)  # type: ignore[arg-type]
    spoilt = sum((mischief.fail, mischief.cut, mischief.stall, mischief.drip))
    with serve(folder, mischief) as url:
        assert fetcher.read(f"{url}/x.tar", start, stop, len(CONTENT)) == CONTENT[start:stop]
    # One byte survives a cut or a drip.
    assert fetcher.retries >= spoilt or stop - start == 1


def test_reads_go_on_at_the_byte_reached(folder: Path) -> None:
    """After 90,000 bytes the next request asks for the rest only."""
    mischief = Mischief(cut=1, cut_after=90_000)
    with serve(folder, mischief) as url:
        assert Fetcher(PATIENT).read(f"{url}/x.tar", 0, 300_000, len(CONTENT)) == CONTENT
    assert mischief.requests == ["x.tar bytes=0-299999", "x.tar bytes=90000-299999"]


def test_a_slow_reader_is_no_stall(folder: Path) -> None:
    """A connection whose pieces are taken one by one, with pauses longer than a stall, is not dropped."""
    with serve(folder) as url:
        fetcher, content = Fetcher(RetryPolicy(1, 0.0, 0.05)), b""
        for piece in fetcher.stream(f"{url}/x.tar"):
            content += piece
            time.sleep(0.06)
    assert content == CONTENT
    assert fetcher.retries == 0


def test_a_stopped_fetcher_takes_nothing_up_again(folder: Path) -> None:
    """Closing a stream does not wait for the pauses between tries."""
    fetcher = Fetcher(RetryPolicy(9, 60.0, 1.0))
    with serve(folder, Mischief(fail=9)) as url, ThreadPoolExecutor(1) as pool:
        reading = pool.submit(fetcher.read, f"{url}/x.tar", 0, 10, len(CONTENT))
        fetcher.stop()
        with pytest.raises(CancelledError):
            reading.result(30)


def test_progress_renews_the_patience(folder: Path) -> None:
    """A connection that breaks after each 70 KB is taken up as often as it takes."""
    with serve(folder, Mischief(cut=100, cut_after=70_000)) as url:
        assert Fetcher(RetryPolicy(1, 0.0, 1.0)).read(f"{url}/x.tar", 0, 300_000, len(CONTENT)) == CONTENT


@pytest.mark.parametrize(
    ("mischief", "says"),
    [
        (Mischief(fail=99), r"cannot be read at byte 10 after 4 tries: HTTP 503; check the network"),
        (Mischief(cut=99, cut_after=0), "after 4 tries: the connection closed early"),
        (Mischief(stall=99), "after 4 tries: .*timed out"),
        (Mischief(drip=99), r"after 4 tries: (fewer than 64 KiB came|.*timed out)"),
        (Mischief(fail=1, status=403), "HTTP 403"),
        (Mischief(fail=1, status=404), "does not exist"),
        (Mischief(no_ranges=True), "does not serve byte ranges"),
        (Mischief(shift=1), "the server sent others"),
    ],
    ids=str,
)
def test_lasting_failures_end_in_one_clear_line(folder: Path, mischief: Mischief, says: str) -> None:
    """What does not pass stops with the address, the reason and what to do."""
    with serve(folder, mischief) as url, pytest.raises(UserError, match=says) as error:
        Fetcher(SHORT).read(f"{url}/x.tar", 10, 2000, len(CONTENT))
    assert "x.tar" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", [lambda c: c[:-1], lambda c: c + b"x", lambda c: c[:100]])
def test_another_size_is_noticed(folder: Path, change: Callable[[bytes], bytes]) -> None:
    """A file that is not as long as its index says is refused before a byte of it is used."""
    (folder / "x.tar").write_bytes(change(CONTENT))
    with serve(folder) as url, pytest.raises(UserError, match="it changed; index it again"):
        Fetcher(PATIENT).read(f"{url}/x.tar", 200, 300, len(CONTENT))


def test_another_content_is_noticed_between_and_within_reads(folder: Path) -> None:
    """A changed ETag stops the stream: never the half of one file and the half of another."""
    fetcher = Fetcher(PATIENT)
    with serve(folder) as url:
        fetcher.read(f"{url}/x.tar", 0, 10, len(CONTENT))
        (folder / "x.tar").write_bytes(CONTENT[::-1])
        with pytest.raises(UserError, match="changed while it was read"):
            fetcher.read(f"{url}/x.tar", 10, 20, len(CONTENT))
    (folder / "x.tar").write_bytes(CONTENT)
    with serve(folder, Mischief(cut=1, cut_after=70_000)) as url:
        pieces = Fetcher(PATIENT).stream(f"{url}/x.tar")
        assert CONTENT.startswith(next(pieces))
        (folder / "x.tar").write_bytes(CONTENT[::-1])
        with pytest.raises(UserError, match="changed while it was read"):
            list(pieces)


@pytest.mark.parametrize("mischief", [Mischief(), Mischief(cut=2, cut_after=70_000), Mischief(no_ranges=True, cut=2)])
def test_streams_bring_the_whole_file_also_without_ranges(folder: Path, mischief: Mischief) -> None:
    """A server that ignores ranges sends everything again; what was had is skipped."""
    with serve(folder, mischief) as url:
        assert b"".join(Fetcher(PATIENT).stream(f"{url}/x.tar")) == CONTENT
        with pytest.raises(RemoteFileMissingError):
            next(Fetcher(PATIENT).stream(f"{url}/gone.tar"))


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_object_stores_refuse_what_is_missing(folder: Path, status: int) -> None:
    """Stores that may not be listed answer 403 for files that are not there."""
    with (
        serve(folder, Mischief(fail=1, status=status)) as url,
        pytest.raises(RemoteFileMissingError, match=f"HTTP {status}"),
    ):
        next(Fetcher(PATIENT).stream(f"{url}/gone.tar"))
    with pytest.raises(UserError, match="spaces as %20"):
        Fetcher(PATIENT).size("http://127.0.0.1/a b.tar")


def test_sizes(folder: Path) -> None:
    """The size is asked for with one byte, again if need be."""
    with serve(folder, Mischief(fail=1)) as url:
        assert Fetcher(PATIENT).size(f"{url}/x.tar") == len(CONTENT)
    with serve(folder, Mischief(no_ranges=True)) as url, pytest.raises(UserError, match="byte ranges"):
        Fetcher(PATIENT).size(f"{url}/x.tar")


def test_an_unreachable_server_is_an_error_of_one_line() -> None:
    """Nobody listens: the address and the reason, after the tries."""
    with serve(Path()) as url:
        pass
    with pytest.raises(UserError, match="after 2 tries"):
        Fetcher(RetryPolicy(2, 0.01, 1.0)).read(f"{url}/x.tar", 0, 1, 1)


def test_fsspec_files_are_read_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another file system: ranges, streams, sizes, errors of its driver that pass, a file that is not
    there."""
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/fetch/x.tar", CONTENT)
    fetcher, url = Fetcher(PATIENT), "memory://fetch/x.tar"
    assert fetcher.read(url, 10, 200_000, len(CONTENT)) == CONTENT[10:200_000]
    assert b"".join(fetcher.stream(url)) == CONTENT
    assert fetcher.size(url) == len(CONTENT)
    with pytest.raises(RemoteFileMissingError):
        fetcher.read("memory://fetch/gone.tar", 0, 1, 1)
    with pytest.raises(UserError, match="index it again"):
        fetcher.read(url, 0, 1, 1)
    with pytest.raises(UserError, match="no driver for nosuch://"):
        fetcher.read("nosuch://x", 0, 1, 1)
    fail = iter([RuntimeError("of the driver"), OSError("of the network")])
    whole = type(memory).cat_file

    def cat_file(self: object, path: str, start: int, end: int) -> bytes:
        for error in fail:
            raise error
        found: bytes = whole(memory, path, start=start, end=end)
        return found[:100_000]

    monkeypatch.setattr(type(memory), "cat_file", cat_file)
    assert fetcher.read(url, 0, 300_000, len(CONTENT)) == CONTENT
    assert fetcher.retries >= 3


class Store(type(fsspec.filesystem("memory"))):  # type: ignore[misc]
    """An object store as s3fs and gcsfs show it: it keeps what listings told, and refuses what it does not have."""

    protocol = "store"
    store: ClassVar[dict[str, object]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    told: ClassVar[dict[str, dict[str, object]]] = {}
    refusal: ClassVar[Exception] = PermissionError("Forbidden")

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("store://").lstrip("/")

    def info(self, path: str, **options: object) -> dict[str, object]:
        """What is known of a file, from a listing if there was one."""
        if path not in self.store:
            raise self.refusal
        content = self.cat_file(path)
        return self.told.setdefault(path, {"size": len(content), "ETag": hash(content)})

    def invalidate_cache(self, path: str | None = None) -> None:
        """Forget it."""
        self.told.clear()


@pytest.fixture
def store() -> Iterator[Store]:
    """An empty one."""
    fsspec.register_implementation("store", Store, clobber=True)
    Store.store.clear()
    yield fsspec.filesystem("store")
    Store.refusal = PermissionError("Forbidden")


def test_a_change_is_noticed_behind_a_kept_listing(store: Store) -> None:
    """The ETag is asked for anew at each read."""
    store.pipe_file("/x.tar", CONTENT)
    store.info("/x.tar")
    fetcher = Fetcher(PATIENT)
    assert fetcher.read("store://x.tar", 0, 10, len(CONTENT)) == CONTENT[:10]
    store.pipe_file("/x.tar", CONTENT[::-1])
    with pytest.raises(UserError, match="changed while it was read"):
        fetcher.read("store://x.tar", 0, 10, len(CONTENT))


class HttpError(Exception):
    """As of gcsfs."""

    code = 401


@pytest.mark.parametrize("refusal", [PermissionError("Forbidden"), OSError("Forbidden: x"), HttpError("401")])
def test_every_driver_s_refusal_is_one(store: Store, refusal: Exception) -> None:
    """s3fs raises PermissionError, gcsfs an OSError with words, or an error of its own with the code: none is tried
    again."""
    Store.refusal = refusal
    fetcher = Fetcher(PATIENT)
    with pytest.raises(RemoteFileMissingError, match="check your access") as error:
        fetcher.size("store://gone.tar")
    assert fetcher.retries == 0
    assert "\n" not in str(error.value)


def test_drivers_that_tell_too_little_or_do_not_start(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of unknown size is refused; a driver that fails when it starts may succeed later; both in one line."""
    store.pipe_file("/x.tar", CONTENT)
    monkeypatch.setattr(Store, "info", lambda self, path: {"size": None})
    with pytest.raises(UserError, match="does not report its size"):
        Fetcher(SHORT).size("store://x.tar")
    monkeypatch.setattr("fsspec.core.url_to_fs", lambda url: dict[str, str]()["no credentials"])
    with pytest.raises(UserError, match="after 4 tries: KeyError: 'no credentials'; check"):
        Fetcher(SHORT).size("store://x.tar")
    with pytest.raises(UserError, match="cannot be listed .*no credentials"):
        list_fsspec("store://*.tar")
    with pytest.raises(UserError, match="cannot be written .*no credentials"):
        Fetcher(SHORT).write("store://x.tar", b"")


def test_a_driver_without_a_host_is_not_asked_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drivers wrap the failed look-up of a host in errors of their own (httpx, aiohttp, botocore): it is found among
    the causes, so that the first try ends with one line."""

    class ConnectError(Exception):
        """As httpx's: no OSError."""

    def info(self: Store, path: str, **_: object) -> None:
        try:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        except OSError as error:
            raise ConnectError("[Errno -2] Name or service not known") from error

    monkeypatch.setattr(Store, "info", info)
    fetcher = Fetcher(PATIENT)
    with pytest.raises(UserError, match=r"store://x\.tar: its host is not known \(Name or service not known\)"):
        fetcher.size("store://x.tar")
    assert fetcher.retries == 0


def test_a_fetcher_survives_pickling(folder: Path) -> None:
    """A process worker's copy reads on its own."""
    with serve(folder) as url:
        copy = pickle.loads(pickle.dumps(Fetcher(PATIENT)))
        assert copy.read(f"{url}/x.tar", 5, 9, len(CONTENT)) == CONTENT[5:9]


def test_a_host_that_does_not_exist_is_an_error_at_once() -> None:
    """A name that no server answers for is wrong, not slow: no retry, and one line that names it."""
    begin = time.monotonic()
    fetcher = Fetcher(RetryPolicy())
    for ask in (lambda url: list(fetcher.stream(url)), fetcher.size):
        with pytest.raises(UserError, match=r"http://no\.such\.host\.invalid/x\.tar: its host is not known"):
            ask("http://no.such.host.invalid/x.tar")
    assert time.monotonic() - begin < 5
    assert fetcher.retries == 0
