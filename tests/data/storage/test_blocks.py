"""Remote shards give the same batches as local ones, or a one-line error; the cache stays below its limit."""

import json
import logging
import threading
from itertools import count, islice
from pathlib import Path

import fsspec
import pytest

from mmssl.data import iter_samples
from mmssl.data.shards import FOLDER_FILE, SampleLimits, ShardIndex, index_shards
from mmssl.data.shards.index import fingerprint
from mmssl.data.sources import make_index
from mmssl.data.storage import Access, Fetcher, RetryPolicy, Span, find_remote_indexes
from mmssl.data.storage.blocks import CHUNK, RemoteReader, chunk_name
from mmssl.data.storage.disk_cache import DiskCache
from mmssl.errors import UserError
from mmssl.types import PipeCommand
from tests.helpers.http_servers import Mischief, serve
from tests.helpers.tars import pair, tar_bytes, toy_stream, write_shards

ACCESS = Access(RetryPolicy(tries=4, backoff_seconds=0.01, stall_seconds=0.7))
PATIENT = RetryPolicy(tries=20, backoff_seconds=0.01, stall_seconds=0.7)
COUNTS = [40, 25, 63]


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    """128 pairs of 60 kB in 3 shards, indexed."""
    shards = write_shards(tmp_path / "shards", COUNTS, size=60_000)
    index_shards(shards, SampleLimits())
    return shards


def urls(url: str) -> list[str]:
    """The served shards."""
    return [f"{url}/{shard:05d}.tar" for shard in range(len(COUNTS))]


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("wrong", [{}, {"fail": 3, "cut": 5, "cut_after": 100_000, "stall": 2}], ids=str)
def test_remote_batches_are_the_local_ones(shards: list[str], workers: int, wrong: dict[str, int]) -> None:
    """Batches equal the local ones across the end of an epoch, whatever connections break."""
    local = toy_stream(shards)
    mischief = Mischief(**wrong)  # type: ignore[arg-type]
    with (
        serve(Path(shards[0]).parent, mischief) as url,
        toy_stream(urls(url), workers=workers, access=Access(PATIENT)) as remote,
    ):
        assert remote.samples == sum(COUNTS)
        for _ in range(local.batches_per_epoch + 2):
            here, there = next(local), next(remote)
            assert here.ids.tolist() == there.ids.tolist()
            assert here.views["main"].tolist() == there.views["main"].tolist()
        assert remote.counters().retries > 0 or not wrong


def test_local_shards_beside_remote_ones_are_read_from_the_disk_alone(
    shards: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One source may have both; only remote shards are fetched ahead."""
    whole, fetched = Fetcher.read, set[str]()

    def read(self: Fetcher, url: str, start: int, stop: int, size: int) -> bytes:
        fetched.add(url)
        return whole(self, url, start, stop, size)

    monkeypatch.setattr(Fetcher, "read", read)
    with serve(Path(shards[0]).parent) as url, toy_stream([urls(url)[0], *shards[1:]], access=ACCESS) as mixed:
        for _ in range(mixed.batches_per_epoch):
            next(mixed)
    assert fetched == {urls(url)[0]}


def test_remote_state_is_the_local_one(shards: list[str]) -> None:
    """A run on local copies resumes on the server: the fingerprint depends on content, not on location."""
    local = toy_stream(shards)
    next(local)
    with serve(Path(shards[0]).parent) as url, toy_stream(urls(url), access=ACCESS) as remote:
        remote.load_state_dict(local.state_dict())
        assert next(remote).ids.tolist() == next(local).ids.tolist()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"fail": 999}, "HTTP 503"),
        ({"stall": 999}, "after 4 tries"),
        ({"no_ranges": True}, "does not serve byte ranges"),
    ],
    ids=str,
)
def test_a_server_that_stays_broken_stops_the_stream(
    shards: list[str], workers: int, wrong: dict[str, int], says: str
) -> None:
    """A one-line error with the address of the shard; no thread is left running."""
    before = threading.active_count()
    with serve(Path(shards[0]).parent, Mischief(**wrong)) as url:  # type: ignore[arg-type]
        stream = toy_stream(urls(url), workers=workers, access=ACCESS)
        with pytest.raises(UserError, match=says) as error:
            next(stream)
        assert ".tar" in str(error.value)
    assert threading.active_count() == before


def test_a_shard_that_changes_on_the_server_stops_the_stream(shards: list[str]) -> None:
    """If a file is replaced by one of the same size during training, no sample of the new file is used."""
    with serve(Path(shards[0]).parent) as url, toy_stream(urls(url), access=ACCESS, slice_mib=0.1) as stream:
        next(stream)
        for shard in shards:
            content = bytearray(Path(shard).read_bytes())
            content[600:700] = bytes(100)
            Path(shard).write_bytes(content)
        with pytest.raises(UserError, match=r"changed while it was read \(ETag"):
            list(islice(stream, 100))


def test_offsets_alone_are_an_index(shards: list[str]) -> None:
    """Without the folder's file the .idx files suffice; without both there is no index; damaged ones are errors."""
    folder = Path(shards[0]).parent
    expected = index_shards(shards, SampleLimits())
    (folder / FOLDER_FILE).unlink()
    with serve(folder) as url:
        found = find_remote_indexes(urls(url), SampleLimits(), Fetcher(ACCESS.retry_policy))
        assert [i is not None and (i.bytes, i.samples, i.checksum) for i in found] == [
            (i.bytes, i.samples, i.checksum) for i in expected
        ]
        Path(f"{shards[1]}.idx").unlink()
        assert find_remote_indexes(urls(url), SampleLimits(), Fetcher(ACCESS.retry_policy))[1] is None
        for content, says in ((b"123", "multiple of 8"), (bytes(24), "does not increase")):
            Path(f"{shards[1]}.idx").write_bytes(content)
            with pytest.raises(UserError, match=says):
                find_remote_indexes(urls(url), SampleLimits(), Fetcher(ACCESS.retry_policy))
        (folder / FOLDER_FILE).write_text('{"shards": {"00000.tar": {"bytes": "x"}}}')
        with pytest.raises(UserError, match=r"index of .*00000\.tar is damaged"):
            find_remote_indexes(urls(url), SampleLimits(), Fetcher(ACCESS.retry_policy))
        (folder / FOLDER_FILE).write_text("[]")
        with pytest.raises(UserError, match="is damaged; index"):
            find_remote_indexes(urls(url), SampleLimits(), Fetcher(ACCESS.retry_policy))


def test_indexing_remote_shards_writes_their_index_beside_them(shards: list[str]) -> None:
    """The files equal those of local shards and keep other entries; web servers and commands are refused."""
    memory = fsspec.filesystem("memory")
    local = index_shards(shards, SampleLimits())
    for shard in shards:
        memory.pipe_file(f"/bare/{Path(shard).name}", Path(shard).read_bytes())
    names = [f"memory://bare/{shard:05d}.tar" for shard in range(len(COUNTS))]
    seen: list[tuple[int, int]] = []
    assert find_remote_indexes(names, SampleLimits(), Fetcher()) == [None] * 3
    make_index(names[1:], SampleLimits(), ACCESS)
    made = make_index([shards[0], *names], SampleLimits(), ACCESS, progress=lambda *now: seen.append(now))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert [i.checksum for i in made] == [local[0].checksum, *(i.checksum for i in local)]
    assert fingerprint(made[1:]) == fingerprint(local)
    found = find_remote_indexes(names, SampleLimits(), Fetcher())
    assert [i and (i.samples, i.checksum, i.bytes) for i in found] == [(i.samples, i.checksum, i.bytes) for i in local]
    for shard in shards:
        name = Path(shard).name
        assert memory.cat_file(f"/bare/{name}.idx") == Path(f"{shard}.idx").read_bytes()
    with serve(Path(shards[0]).parent) as url, pytest.raises(UserError, match="cannot be written over HTTP"):
        make_index(urls(url), SampleLimits(), ACCESS)
    with pytest.raises(UserError, match="is a command"):
        make_index([PipeCommand("pipe:cat x")], SampleLimits(), ACCESS)


def test_damage_of_a_remote_shard_is_in_its_index(tmp_path: Path) -> None:
    """Sequential reading finds a cut shard and an incomplete pair, as on disk."""
    shard = bare_shards(tmp_path, [3, 1])[0]
    content = Path(shard).read_bytes()
    memory = fsspec.filesystem("memory")
    for cut in (len(content), 9000, 2100, 0):
        Path(shard).write_bytes(content[:cut])
        memory.pipe_file("/cut/x.tar", content[:cut])
        (there,), (here,) = (
            make_index(["memory://cut/x.tar"], SampleLimits(8000), ACCESS),
            index_shards([shard], SampleLimits(8000)),
        )
        assert (there.left_out, there.problems, there.checksum) == (here.left_out, here.problems, here.checksum)


def test_a_query_stays_behind_the_suffix(shards: list[str]) -> None:
    """The query of a signed address is also used for the index."""
    mischief = Mischief()
    with serve(Path(shards[0]).parent, mischief) as url:
        (found,) = find_remote_indexes([f"{url}/00000.tar?token=1"], SampleLimits(), Fetcher(ACCESS.retry_policy))
        stream = toy_stream([f"{url}/00000.tar?token=1"], access=ACCESS)
        next(stream)
        stream.close()
    assert found is not None
    assert found.samples == COUNTS[0]
    assert fingerprint([found]) == fingerprint(index_shards(shards[:1], SampleLimits())), "without the token"
    assert {request.split()[0] for request in mischief.requests} == {FOLDER_FILE, "00000.tar", "00000.tar.idx"}


def some_file(folder: Path, size: int) -> ShardIndex:
    """The index of a served file of numbered bytes, not a real shard."""
    (folder / "x.tar").write_bytes(b"".join(i.to_bytes(8, "big") for i in range(size // 8)))
    return ShardIndex("x.tar", size, 0, 0, (), (), "", 0)


def test_chunks_are_fetched_once_ahead_and_in_few_requests(tmp_path: Path) -> None:
    """Prefetched spans take few requests and no more when read; other spans are fetched when read."""
    size = 20 * CHUNK
    shard, mischief = some_file(tmp_path, size), Mischief()
    content = (tmp_path / "x.tar").read_bytes()
    with serve(tmp_path, mischief) as url:
        shard = ShardIndex(f"{url}/x.tar", size, 0, 0, (), (), "", 0)
        files = RemoteReader(Fetcher(ACCESS.retry_policy), None)
        files.prefetch(
            "lane", [Span(shard, 100, 3 * CHUNK), Span(shard, 3 * CHUNK + 5, 4 * CHUNK), Span(shard, 19 * CHUNK, size)]
        )
        for start, stop in ((100, 200), (CHUNK - 1, 3 * CHUNK + 1), (size - 1, size), (7, 7), (0, 10)):
            assert files.read(shard, start, stop) == content[start:stop]
        assert sorted(mischief.requests) == [
            f"x.tar bytes=0-{4 * CHUNK - 1}",
            f"x.tar bytes={19 * CHUNK}-{size - 1}",
        ]
        assert files.read(shard, 6 * CHUNK, 6 * CHUNK + 9) == content[6 * CHUNK : 6 * CHUNK + 9]
        assert len(mischief.requests) == 3
        files.close()


def test_cache_keeps_chunks_on_disk_and_stays_below_its_size(tmp_path: Path) -> None:
    """A second reader sends no request; a damaged chunk is fetched again; the oldest are removed first."""
    (tmp_path / "www").mkdir()
    size, mischief = 6 * CHUNK + 104, Mischief()
    some_file(tmp_path / "www", size)
    content = (tmp_path / "www" / "x.tar").read_bytes()
    with serve(tmp_path / "www", mischief) as url:
        shard = ShardIndex(f"{url}/x.tar", size, 0, 0, (), (), "", 0)
        access = Access(ACCESS.retry_policy, DiskCache(tmp_path / "cache", 10 * CHUNK))

        def read() -> int:
            before = len(mischief.requests)
            files = access.open()
            assert files.read(shard, 0, size) == content
            files.close()
            return len(mischief.requests) - before

        assert read() == 1
        assert read() == 0
        kept = sorted((tmp_path / "cache").glob("*/*"))
        assert len(kept) == 7
        assert sum(path.stat().st_size for path in kept) == size + 7 * 4
        kept[0].write_bytes(b"cut")
        assert read() == 1
        kept[2].write_bytes(kept[2].read_bytes()[:-9] + bytes(9))
        assert read() == 1, "harmed in place"
        kept[3].unlink()
        assert read() == 1
        cache = DiskCache(tmp_path / "cache", 3 * CHUNK)
        cache.get(chunk_name(shard, 2))
        cache.sweep()
        assert sum(path.stat().st_size for path in (tmp_path / "cache").glob("*/*")) <= 3 * CHUNK
        assert cache.get(chunk_name(shard, 2)) == content[2 * CHUNK : 3 * CHUNK], "the one used last stays"


@pytest.mark.parametrize("spoilt", [False, True])
def test_other_file_systems(shards: list[str], spoilt: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards and index on an fsspec file system (s3 and gs are others) give the local batches, into the second epoch;
    also where every third read fails, in turn with an error of the driver, of the network, or early."""
    memory = fsspec.filesystem("memory")
    for path in Path(shards[0]).parent.iterdir():
        memory.pipe_file(f"/remote/{path.name}", path.read_bytes())
    names = [f"memory://remote/{shard:05d}.tar" for shard in range(len(COUNTS))]
    whole, reads = type(memory).cat_file, count()

    def cat_file(self: object, path: str, start: int | None = None, end: int | None = None) -> bytes:
        found: bytes = whole(memory, path, start=start, end=end)
        wrong = next(reads) % 9
        if wrong == 2:
            raise RuntimeError("SlowDown: reduce your request rate")
        if wrong == 5:
            raise ConnectionResetError("reset by peer")
        return found[: len(found) // 2] if wrong == 8 else found

    if spoilt:
        monkeypatch.setattr(type(memory), "cat_file", cat_file)
    local = toy_stream(shards)
    with toy_stream(names, workers=2, access=Access(PATIENT)) as remote:
        for _ in range(local.batches_per_epoch + 1):
            here, there = next(local), next(remote)
            assert here.ids.tolist() == there.ids.tolist()
            assert here.views["main"].tolist() == there.views["main"].tolist()
        assert (remote.counters().retries > 0) == spoilt


def test_iter_samples_reads_remote_shards(shards: list[str]) -> None:
    """All samples in order, once each, without an index."""
    expected = list(iter_samples(shards))
    for path in Path(shards[0]).parent.glob("*i*"):
        path.unlink()
    with serve(Path(shards[0]).parent) as url:
        found = list(iter_samples(urls(url)))
    assert [(s.id, s.key, s.image, s.fields) for s in found] == [(s.id, s.key, s.image, s.fields) for s in expected]


def bare_shards(folder: Path, counts: list[int]) -> list[str]:
    """Shards without an index; the first has bad samples."""
    shards = write_shards(folder, counts)
    files = [*pair("0-0"), ("alone.jpg", b""), *pair("0-1"), ("big.jpg", bytes(9000)), ("big.txt", b""), *pair("0-2")]
    Path(shards[0]).write_bytes(tar_bytes(files)[:-600])
    return shards


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_without_an_index_are_streamed(tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture) -> None:
    """Lanes read complete shards, repeatedly; one line warns of it; bad samples are counted and logged."""
    bare_shards(tmp_path, [3, 20, 20, 20])
    log = tmp_path / "bad.jsonl"
    seen: dict[str, int] = {}
    with serve(tmp_path, Mischief(cut=2)) as url:
        names = [f"{url}/{shard:05d}.tar" for shard in range(4)]
        options = {"lanes": None, "workers": workers, "access": ACCESS, "bad_log": log, "limits": SampleLimits(8000)}
        with toy_stream(names, max_bad_fraction=1.0, **options) as stream:
            for _ in range(80):
                batch = next(stream)
                assert len(batch) == 8
                for key in batch.keys:
                    seen[key] = seen.get(key, 0) + 1
            with pytest.raises(UserError, match="number of samples is unknown"):
                assert stream.batches_per_epoch
            assert stream.counters().retries == 2
    assert len(seen) == 63
    assert caplog.text.count("4 shards have no index") == 1
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert {(line["key"], line["error"]) for line in lines} >= {("alone", "no text")}
    assert any(line["key"] == "big" and "more than the limit" in line["error"] for line in lines)


def test_streamed_shards_resume_with_another_order(tmp_path: Path) -> None:
    """A state restarts the stream in a new order, which the same state reproduces."""
    shards = bare_shards(tmp_path, [3, 20, 20, 20])
    commands = [PipeCommand(f"pipe:cat {shard}") for shard in shards]
    with toy_stream(commands, lanes=2, max_bad_fraction=1.0) as stream:
        first = [next(stream).keys for _ in range(3)]
        state = json.loads(json.dumps(stream.state_dict()))
        stream.load_state_dict(state)
        second = [next(stream).keys for _ in range(3)]
    with toy_stream(commands, lanes=2, max_bad_fraction=1.0) as again:
        assert [next(again).keys for _ in range(3)] == first
        again.load_state_dict(state)
        assert [next(again).keys for _ in range(3)] == second
    assert first != second


def test_streamed_shards_need_enough_shards_and_working_commands(tmp_path: Path) -> None:
    """Too few shards, a failing command and only bad samples are one-line errors."""
    shards = bare_shards(tmp_path, [3, 20])
    commands = [PipeCommand(f"pipe:cat {shard}") for shard in shards]
    with pytest.raises(UserError, match="2 shards without an index cannot be read by 4 processes"):
        toy_stream(commands, lanes=None, world_size=4)
    with pytest.raises(UserError, match="in 4 lanes"):
        toy_stream(commands, lanes=4)
    with toy_stream([PipeCommand("pipe:exit 3")], lanes=1) as stream, pytest.raises(UserError, match="exit status 3"):
        next(stream)
    (tmp_path / "bad.tar").write_bytes(tar_bytes((f"{i}.jpg", b"") for i in range(300)))
    with (
        toy_stream([PipeCommand(f"pipe:cat {tmp_path}/bad.tar")], lanes=1, max_bad_fraction=1.0) as stream,
        pytest.raises(UserError, match="100 samples in a row"),
    ):
        next(stream)
    (tmp_path / "bad.tar").write_bytes(tar_bytes([]))
    with (
        toy_stream([PipeCommand(f"pipe:cat {tmp_path}/bad.tar")], lanes=1, max_bad_fraction=1.0) as stream,
        pytest.raises(UserError, match="100 samples in a row .*the shard holds no sample"),
    ):
        next(stream)
    broken = [f for i in range(300) for f in ((f"{i}.jpg", b"broken"), (f"{i}.txt", b""))]
    (tmp_path / "bad.tar").write_bytes(tar_bytes(broken))
    with (
        toy_stream([PipeCommand(f"pipe:cat {tmp_path}/bad.tar")], lanes=1, max_bad_fraction=1.0) as stream,
        pytest.raises(UserError, match="100 samples in a row"),
    ):
        next(stream)


def test_closing_ends_commands(tmp_path: Path) -> None:
    """A command that never ends is killed with the stream."""
    shards = write_shards(tmp_path, [400])
    command = PipeCommand(f"pipe:echo $$ > {tmp_path}/pid; cat {shards[0]}; exec sleep 1000")
    stream = toy_stream([command], lanes=1, workers=1)
    next(stream)
    process = int((tmp_path / "pid").read_text())
    assert Path(f"/proc/{process}").exists()
    stream.close()
    assert not Path(f"/proc/{process}").exists()


def test_a_slow_server_is_reported_while_it_stalls(shards: list[str], caplog: pytest.LogCaptureFixture) -> None:
    """The log names the shard and the byte at which it broke off."""
    caplog.set_level(logging.WARNING)
    with (
        serve(Path(shards[0]).parent, Mischief(stall=1, cut_after=70_000)) as url,
        toy_stream(urls(url), access=ACCESS) as stream,
    ):
        next(stream)
    assert "broke off at byte" in caplog.text


def test_a_command_that_stalls_is_reported_with_the_byte(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """For a shard without an index, the log names the shard and the byte after the last complete sample."""
    caplog.set_level(logging.WARNING)
    (shard,) = write_shards(tmp_path, [20])
    command = PipeCommand(f"pipe:head -c 10000 {shard}; sleep 1; tail -c +10001 {shard}")
    with toy_stream([command], lanes=1, workers=1, stall_seconds=0.1) as stream:
        next(stream)
    # A sample is two headers and two blocks of data; the fifth one's end is still to come.
    assert f"worker 0 reads {command} at byte {4 * 2048} since" in caplog.text
