"""The loader returns the batches of the plan, complete and in order, for any workers and after any error."""

import json
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import pytest
import torch

from mmssl.config import SourceConfig
from mmssl.data import Source, TrainLoader, resolve_sources
from mmssl.data.loading import PartTask, split_tasks
from mmssl.data.storage import Access, LocalFiles
from mmssl.data.transforms.render import Rendered
from mmssl.errors import UserError
from mmssl.types import Batch, Sample
from tests.helpers.tars import pair, tar_bytes, toy_loader, toy_render, toy_stream, write_shards

COUNTS = [13, 1, 30, 0, 22]


def join(parts: Sequence[Batch]) -> tuple[list[int], list[str], torch.Tensor]:
    """Ids, keys and images of the ranks' parts of a batch."""
    ids = [number for part in parts for number in part.ids.tolist()]
    return (
        ids,
        [key for part in parts for key in part.keys],
        torch.cat([part.views["main"] for part in parts]),
    )


def ids_of(stream: TrainLoader, count: int) -> list[list[int]]:
    """Sample ids of the next batches."""
    return [batch.ids.tolist() for batch in islice(stream, count)]


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    """66 pairs in 5 shards, one of them empty."""
    return write_shards(tmp_path, COUNTS)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_global_batches_are_the_same_for_any_world_and_threads(
    shards: list[str], world_size: int, workers: int
) -> None:
    """Ids, keys and pixels of 12 batches, across the ends of epochs, are the same joined over ranks as on one rank."""
    alone = toy_stream(shards, batch_size=12)
    ranks = [
        toy_stream(shards, batch_size=12, rank=r, world_size=world_size, workers=workers) for r in range(world_size)
    ]
    for _ in range(12):
        expected, found = join([next(alone)]), join([next(stream) for stream in ranks])
        assert found[:2] == expected[:2]
        assert torch.equal(found[2], expected[2])
    for stream in [alone, *ranks]:
        stream.close()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_processes_make_the_batches_that_threads_make(shards: list[str]) -> None:
    """Two worker processes give the same batches, resume from a state, ignore signals, and end with the stream."""
    with toy_stream(shards, workers=2) as threads:
        expected = [next(threads) for _ in range(20)]
    with toy_stream(shards, workers=2, worker_kind="process") as processes:
        processes.load_state_dict(json.loads(json.dumps(toy_state_after(shards, 2))))
        for number, batch in enumerate(expected[2:]):
            found = next(processes)
            if number == 0:
                for child in multiprocessing.active_children():
                    os.kill(child.pid or 0, signal.SIGINT)
                    os.kill(child.pid or 0, signal.SIGTERM)
            assert join([found])[:2] == join([batch])[:2]
            assert torch.equal(found.views["main"], batch.views["main"])
            assert torch.equal(found.tokens, batch.tokens)
    assert multiprocessing.active_children() == []


def toy_state_after(shards: list[str], batches: int) -> dict[str, int | str]:
    """The state of a stream after a number of batches."""
    stream = toy_stream(shards)
    ids_of(stream, batches)
    return stream.state_dict()


def test_batches_hold_the_samples_they_name(shards: list[str]) -> None:
    """Ids number the dataset in order; keys, pixels, tokens and masks belong to those samples."""
    keys = [f"{shards[s]}:{s}-{i}" for s, count in enumerate(COUNTS) for i in range(count)]
    stream = toy_stream(shards)
    seen = []
    for _ in range(stream.batches_per_epoch):
        batch = next(stream)
        assert batch.keys == [keys[number] for number in batch.ids.tolist()]
        texts = [
            "".join(map(chr, row[mask].tolist())) for row, mask in zip(batch.tokens, batch.token_mask, strict=True)
        ]
        assert texts == [f"caption of {key.rpartition(':')[2]}" for key in batch.keys]
        assert batch.views["main"].shape == (8, 3, 2, 2)
        seen += batch.ids.tolist()
    assert len(set(seen)) == len(seen) == stream.samples_per_epoch == 64
    assert stream.samples == 66


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_after_every_batch_continues_the_order(shards: list[str], workers: int) -> None:
    """The state after each batch resumes a new stream or the same one; prefetched batches are not skipped."""
    with toy_stream(shards, workers=workers) as stream:
        states = [json.dumps(stream.state_dict())]
        whole = []
        for _ in range(20):
            whole += ids_of(stream, 1)
            states.append(json.dumps(stream.state_dict()))
    for step, state in enumerate(states):
        with toy_stream(shards, workers=workers) as again:
            again.load_state_dict(json.loads(state))
            assert ids_of(again, min(3, 20 - step)) == whole[step : step + 3]
            again.load_state_dict(json.loads(states[0]))
            assert ids_of(again, 1) == whole[:1]


def test_state_goes_over_to_another_world_and_batch_size(shards: list[str]) -> None:
    """The state of one rank resumes two ranks, or another batch size with the lanes of the state."""
    with toy_stream(shards, batch_size=8) as stream:
        ids_of(stream, 3)
        state = stream.state_dict()
        rest = ids_of(stream, 2)
    ranks = [toy_stream(shards, batch_size=8, rank=r, world_size=2) for r in range(2)]
    for stream in ranks:
        stream.load_state_dict(state)
    assert [i for stream in ranks for i in ids_of(stream, 1)[0]] == rest[0]
    larger = toy_stream(shards, batch_size=16, lanes=None)
    larger.load_state_dict(state)
    assert sorted(ids_of(larger, 1)[0]) == sorted(rest[0] + rest[1])
    with pytest.raises(UserError, match="4 lanes"):
        toy_stream(shards, batch_size=6, lanes=3).load_state_dict(state)
    with pytest.raises(UserError, match="the seed changed"):
        toy_stream(shards, seed=1).load_state_dict(state)


def test_moved_shards_resume_and_changed_ones_do_not(tmp_path: Path) -> None:
    """The state identifies the data by content: another folder is accepted, another sample is not."""
    first, moved = write_shards(tmp_path / "a", COUNTS), write_shards(tmp_path / "b", COUNTS)
    stream = toy_stream(first)
    ids_of(stream, 2)
    other = toy_stream(moved)
    other.load_state_dict(stream.state_dict())
    assert ids_of(other, 2) == ids_of(stream, 2)
    with pytest.raises(UserError, match="the shards"):
        toy_stream(write_shards(tmp_path / "c", [*COUNTS, 1])).load_state_dict(stream.state_dict())


def broken_shards(folder: Path, bad: set[int], count: int = 64) -> list[str]:
    """One shard of pairs, the images of `bad` broken."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [
        (name, b"broken" if number in bad and name.endswith("jpg") else content)
        for number in range(count)
        for name, content in pair(f"{number:03d}")
    ]
    (folder / "x.tar").write_bytes(tar_bytes(files))
    return [str(folder / "x.tar")]


def test_bad_samples_get_the_same_stand_ins_everywhere(tmp_path: Path) -> None:
    """For any world size and workers, a bad sample is replaced by the same good one, and it is logged."""
    bad = {3, 17, 18, 40}
    shards = broken_shards(tmp_path / "a", bad)
    expected = None
    for world_size, workers in ((1, 0), (1, 3), (2, 2), (4, 1)):
        log = tmp_path / f"bad-{world_size}-{workers}.jsonl"
        options = {"max_bad_fraction": 1.0, "bad_log": log, "world_size": world_size, "workers": workers}
        ranks = [toy_stream(shards, rank=r, **options) for r in range(world_size)]
        found = [join([next(stream) for stream in ranks]) for _ in range(8)]
        for stream in ranks:
            stream.close()
        expected = expected or found
        for (ids, keys, pixels), (ids2, keys2, pixels2) in zip(expected, found, strict=True):
            assert ids == ids2
            assert keys == keys2
            assert torch.equal(pixels, pixels2)
            assert not bad & set(ids)
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        assert sorted(line["key"] for line in lines) == [f"{number:03d}" for number in sorted(bad)]
        assert all(line["shard"] == shards[0] and line["error"] == "it is broken" for line in lines)
        assert sum(stream.counters().bad_samples for stream in ranks) == len(bad)
    good = toy_stream(broken_shards(tmp_path / "b", set()))
    for (ids, _, _), batch in zip(expected or [], good, strict=False):
        for mine, planned in zip(ids, batch.ids.tolist(), strict=True):
            assert mine == planned or planned in bad


def test_samples_whose_text_or_bytes_are_bad_get_stand_ins_too(tmp_path: Path) -> None:
    """Captions that are not UTF-8 are found before rendering, even if all captions of a part are bad."""
    files = [f for i in range(16) for f in ((f"{i}.jpg", b"i%d" % i), (f"{i}.txt", b"\xff" if i < 8 else b"good"))]
    path = tmp_path / "x.tar"
    path.write_bytes(tar_bytes(files))
    log = tmp_path / "bad.jsonl"
    stream = toy_stream([str(path)], batch_size=4, lanes=4, max_bad_fraction=1.0, bad_log=log)
    for _ in range(4):
        assert min(next(stream).ids.tolist()) >= 8
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(lines) == 8
    assert {line["key"] for line in lines} == {str(i) for i in range(8)}
    assert all(line["error"] == ".txt is not UTF-8 (byte 0)" for line in lines)


def test_too_many_bad_samples_stop_the_stream(tmp_path: Path) -> None:
    """Three one-line errors: too large a fraction after 1,000 samples, 100 in a row, and no usable stand-in."""
    log = tmp_path / "bad.jsonl"
    options = {"max_bad_fraction": 0.05, "workers": 2, "bad_log": log}
    some = toy_stream(broken_shards(tmp_path / "a", set(range(0, 64, 16))), **options)
    message = rf"63 of 1000 samples .* data\.bad_samples=0\.05; the last one is '0\d\d' .*; all are in {log}"
    with pytest.raises(UserError, match=message) as error:
        ids_of(some, 200)
    assert "\n" not in str(error.value)
    row = toy_stream(broken_shards(tmp_path / "b", set(range(100)), 101), batch_size=1, lanes=1, max_bad_fraction=1.0)
    with pytest.raises(UserError, match="100 samples in a row could not be used"):
        ids_of(row, 2000)
    every = toy_stream(broken_shards(tmp_path / "c", set(range(64))), max_bad_fraction=1.0)
    with pytest.raises(UserError, match="can stand in for '0"):
        next(every)


def test_index_exclusions_are_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Samples excluded by the index are logged at the start, by the first rank only."""
    path = tmp_path / "x.tar"
    path.write_bytes(tar_bytes([*(f for i in range(8) for f in pair(str(i))), ("alone.jpg", b"")]))
    for rank in range(2):
        toy_stream([str(path)], rank=rank, world_size=2)
    assert caplog.text.count("unusable samples left out: 1,") == 1


class Failing:
    """A rendering that fails like a bug, not like a bad sample."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __call__(self, samples: Sequence[Sample], epoch: int) -> Rendered:
        if any(s.key == "0-5" for s in samples):
            raise self.error
        return toy_render(samples, epoch)


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("error", [UserError("a line"), KeyError("bug")])
def test_errors_of_workers_come_out_where_the_batch_is_asked_for(
    shards: list[str], workers: int, error: Exception
) -> None:
    """The original error is raised after the batches before it, and no thread is left running."""
    before = threading.active_count()
    stream = toy_loader([Source(shards)], Failing(error), workers=workers)
    with pytest.raises(type(error)) as raised:
        ids_of(stream, 100)
    assert raised.value is error
    assert threading.active_count() <= before


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_errors_of_processes_come_out_as_themselves(shards: list[str]) -> None:
    """A UserError of a worker process is raised as one line."""
    stream = toy_loader([Source(shards)], Failing(UserError("a line")), workers=1, worker_kind="process")
    with pytest.raises(UserError, match=r"^a line$"):
        ids_of(stream, 100)


@pytest.mark.parametrize("workers", [1, 3])
def test_closing_leaves_no_thread(shards: list[str], workers: int) -> None:
    """Closing during prefetching, by `with` or twice, joins every thread; the stream can continue afterwards."""
    before = threading.active_count()
    with toy_stream(shards, workers=workers) as stream:
        first = ids_of(stream, 2)
        assert threading.active_count() > before
    stream.close()
    assert threading.active_count() <= before
    whole = ids_of(toy_stream(shards), 3)
    assert [*first, *ids_of(stream, 1)] == whole
    stream.close()


def test_worker_threads_use_one_core_each(shards: list[str]) -> None:
    """torch uses 1 thread inside the workers; outside, the number is unchanged."""
    inside: set[int] = set()

    def render(samples: Sequence[Sample], epoch: int) -> Rendered:
        inside.add(torch.get_num_threads())
        return toy_render(samples, epoch)

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    with toy_loader([Source(shards)], render, workers=2) as stream:
        ids_of(stream, 3)
        assert torch.get_num_threads() == 3
    torch.set_num_threads(before)
    assert inside == {1}


def test_prefetching_is_bounded(shards: list[str]) -> None:
    """After one batch is taken, at most `batches_ahead` + 1 batches are rendered in total."""
    made: list[int] = []

    def render(samples: Sequence[Sample], epoch: int) -> Rendered:
        made.append(len(samples))
        return toy_render(samples, epoch)

    with toy_loader([Source(shards)], render, workers=1, batches_ahead=2) as stream:
        next(stream)
        for _ in range(20):
            time.sleep(0.01)
        assert sum(made) <= 3 * 8


def test_a_stalled_worker_is_reported_with_shard_and_byte(shards: list[str], caplog: pytest.LogCaptureFixture) -> None:
    """While a read hangs, the log names the worker, the shard and the byte; then the stream continues."""
    caplog.set_level(logging.WARNING)
    hang = threading.Event()

    class HangingFiles(LocalFiles):
        def read(self, shard: str, start: int, stop: int) -> bytes:
            hang.wait(20)
            return super().read(shard, start, stop)

    timer = threading.Timer(0.5, hang.set)
    timer.start()
    with toy_stream(shards, workers=1, stall_seconds=0.1, access=Access(open_local=HangingFiles)) as stream:
        next(stream)
    timer.join()
    assert "no batch for" in caplog.text
    assert any(f"worker 0 reads {shard} at byte " in caplog.text for shard in shards)


def test_mixture_counts_and_epochs(tmp_path: Path) -> None:
    """Sources keep their fractions, ids do not overlap, and repeats of a source are rendered for another epoch."""
    a, b = write_shards(tmp_path / "a", [40]), write_shards(tmp_path / "b", [20])
    epochs: dict[str, set[int]] = {}

    def render(samples: Sequence[Sample], epoch: int) -> Rendered:
        for sample in samples:
            where = f"{sample.shard}:{sample.key}"
            assert epoch not in epochs.setdefault(where, set())
            epochs[where].add(epoch)
        return toy_render(samples, epoch)

    sources = [Source(a, 1.0), Source(b, 3.0)]
    stream = toy_loader(sources, render, batch_size=16, lanes=4)
    threaded = toy_loader(sources, batch_size=16, lanes=4, workers=3)
    for _ in range(30):
        batch, other = next(stream), next(threaded)
        assert batch.keys == other.keys
        assert torch.equal(batch.views["main"], other.views["main"])
        assert sum(number >= 40 for number in batch.ids.tolist()) == 12
    threaded.close()
    assert stream.counters().source_samples == (120, 360)
    assert {len(seen) for where, seen in epochs.items() if where.startswith(b[0])} == {18}


def test_counters_count_samples_bytes_and_waiting(shards: list[str]) -> None:
    """Bytes count members and their headers; samples count those in returned batches."""
    stream = toy_stream(shards)
    ids_of(stream, 3)
    counters = stream.counters()
    assert counters.samples == 24
    assert counters.bytes == 24 * 4 * 512
    assert counters.bad_samples == 0
    assert counters.wait_seconds > 0


def test_batches_and_shards_that_do_not_fit_are_refused(tmp_path: Path, shards: list[str]) -> None:
    """Batches larger than the data, indivisible batches and shards without samples are one-line errors."""
    with pytest.raises(UserError, match="takes 128 samples of a source that has 66"):
        toy_stream(shards, batch_size=128)
    with pytest.raises(UserError, match="not divisible by 3 processes"):
        toy_stream(shards, world_size=3)
    path = tmp_path / "empty.tar"
    path.write_bytes(tar_bytes([("a.jpg", b"")]))
    with pytest.raises(UserError, match=r"no usable sample .*:a \(no text\)"):
        toy_stream([str(path)])


def test_sources_of_a_configuration(shards: list[str]) -> None:
    """All plain patterns are one source; each weighted entry is a source of its own."""
    folder = str(Path(shards[0]).parent)
    assert resolve_sources(folder) == [Source(shards)]
    assert resolve_sources(shards[:2]) == [Source(shards[:2])]
    mixed = [shards[0], SourceConfig(shards=shards[2:], weight=2.0), shards[1]]
    assert resolve_sources(mixed) == [Source(shards[:2]), Source(shards[2:], 2.0)]
    with pytest.raises(UserError, match="no shards"):
        resolve_sources([])


@pytest.mark.parametrize(
    ("start", "stop", "depth", "workers", "cuts"),
    [
        (0, 64, 8, 3, [(0, 24), (24, 40), (40, 64)]),
        (0, 64, 32, 4, [(0, 16), (16, 32), (32, 48), (48, 64)]),
        (4, 12, 4, 2, [(4, 8), (8, 12)]),
        (0, 2, 1, 4, [(0, 1), (1, 2)]),
    ],
)
def test_workers_get_whole_lanes_where_there_are_enough(
    start: int, stop: int, depth: int, workers: int, cuts: list[tuple[int, int]]
) -> None:
    """Samples are split between lanes unless a worker would get none."""
    tasks = split_tasks(PartTask(64, start, stop), depth, workers)
    assert tasks == [PartTask(64, *cut) for cut in cuts]
