"""Signals ask a run to stop, once: it saves and leaves, wherever it waits."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed.run
from torch.distributed.elastic.multiprocessing.api import SignalException

from mmssl import system
from mmssl.cli import main
from mmssl.config import Config, parse_config
from mmssl.data.shards import SampleLimits, index_shards
from mmssl.data.storage import LocalFiles
from mmssl.distributed import launch
from mmssl.errors import StopRequested
from mmssl.train import recovery as signals
from mmssl.train.recovery import StopRequest
from mmssl.train.trainer import train
from tests.helpers.http_servers import Mischief, serve
from tests.helpers.tiny_runs import run_tree, write_pairs

ROOT = Path(__file__).parents[2]
LEAVE_SECONDS = 10.0


def test_the_same_request_may_arrive_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A SIGTERM that a launcher passes on to a process that had it already does not end the process before it saved;
    one that comes later does what it did before."""
    with StopRequest() as request:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.signal == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGINT)
        assert request.signal == signal.SIGTERM
        monkeypatch.setattr(signals, "SAME_SECONDS", -1.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_processes_started_here_end_with_the_signals_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's launcher raises what stopped it: no traceback, and 128 plus the signal. It passes on every signal to
    stop."""

    def stopped(_: list[str]) -> None:
        raise SignalException("stopped", signal.SIGTERM)

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("PET_SIGNALS_TO_HANDLE", raising=False)
    monkeypatch.setattr(torch.distributed.run, "main", stopped)
    with pytest.raises(SystemExit) as ended:
        launch.start_processes(2, "mmssl.train", [])
    assert ended.value.code == 128 + 15
    handled = torch.distributed.run.get_args_parser().parse_args(["script"]).signals_to_handle.split(",")
    assert {signal.Signals(number).name for number in system.stop_signals()} <= set(handled)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"])
def test_every_signal_to_stop_is_remembered(name: str) -> None:
    """Ctrl-C, the end of a job, a closed terminal and a scheduler's warnings; afterwards all is as before."""
    before = {number: signal.getsignal(number) for number in system.stop_signals()}
    number = getattr(signal, name)
    with StopRequest() as request:
        assert not request.requested
        os.kill(os.getpid(), number)
        assert request.signal == number
    assert {number: signal.getsignal(number) for number in system.stop_signals()} == before


def test_a_closed_terminal_is_ignored_under_nohup() -> None:
    """Who started the run with `nohup` asked for it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as request:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not request.requested
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_wait_ends_with_the_signal_and_does_not_begin_after_it() -> None:
    """Only marked waits end; work that must be whole goes on."""
    with StopRequest() as request:
        with request.waiting(raises=False):
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0)
        assert request.requested
        with pytest.raises(StopRequested) as stopped, request.waiting():
            pytest.fail("the wait began")
        assert stopped.value.number == signal.SIGUSR1
    with StopRequest() as request:
        sender = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGHUP))
        sender.start()
        begin = time.monotonic()
        with pytest.raises(StopRequested), request.waiting():
            threading.Event().wait(60)
        assert time.monotonic() - begin < LEAVE_SECONDS


def test_a_second_signal_under_the_command_line_leaves_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line's handler would take it for a first one, and wait."""

    def leave(number: int) -> None:
        raise SystemExit(128 + number)

    monkeypatch.setattr(system, "leave", leave)
    monkeypatch.setattr(signals, "SAME_SECONDS", -1.0)
    with system.on_stop_signals(lambda number, _: pytest.fail(f"{number} went to the command line")), StopRequest():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(SystemExit) as left:
            os.kill(os.getpid(), signal.SIGTERM)
        assert left.value.code == 128 + signal.SIGTERM


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 small images in two tars."""
    folder = write_pairs(tmp_path_factory.mktemp("shards"))
    index_shards([str(path) for path in folder.glob("*.tar")], SampleLimits())
    return folder


def config(shards: Path | str, run: Path, **changes: Any) -> Config:
    tree = run_tree(Path("unused"), run, **{"train__keep": 9, **changes})
    tree["data"]["train"] = f"{shards}/{{0,1}}.tar"
    return parse_config(tree, "test")


@pytest.fixture(scope="module")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One uninterrupted run with checkpoints of steps 3, 6 and 8, evaluated at step 6 and at the end."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    train(config(shards, run, **suites(shards)))
    return run


def suites(shards: Path | str) -> dict[str, Any]:
    data = {"colors": {"data": f"{shards}/{{0,1}}.tar", "task": "retrieval"}}
    return {"evaluate": {"suites": data, "every": 6, "best": "colors/retrieval/text_recall@1"}}


@contextmanager
def signalled_when(ready: Callable[[], bool], number: int = signal.SIGTERM) -> Iterator[list[float]]:
    """Send a signal to this process once a condition holds; the list gets the time."""
    sent: list[float] = []
    ended = threading.Event()

    def send() -> None:
        while not ready() and not ended.wait(0.02):
            pass
        if not ended.is_set():
            time.sleep(0.3)
            sent.append(time.monotonic())
            os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield sent
    finally:
        ended.set()
        thread.join()


def assert_same_end(run: Path, finished: Path) -> None:
    for name in ("checkpoints/step-000000008/model.safetensors", "checkpoints/step-000000008/optimizer.safetensors"):
        assert (run / name).read_bytes() == (finished / name).read_bytes()
    assert (run / "sample_ids.jsonl").read_text() == (finished / "sample_ids.jsonl").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_run_whose_disk_stalls_saves_and_leaves(
    workers: int, number: int, shards: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reads of a network disk hang in the fifth step or so: a signal ends the wait, the steps done so far are
    saved, and the resumed run ends bit-identical."""
    if workers and number != signal.SIGTERM:
        pytest.skip("one signal is enough for each kind of workers")
    run, back, reads = tmp_path / "run", threading.Event(), list[int]()
    read = LocalFiles.read

    def stalling(self: LocalFiles, shard: str, start: int, stop: int) -> bytes:
        reads.append(start)
        if len(reads) > 56:
            back.wait(60)
        return read(self, shard, start, stop)

    monkeypatch.setattr(LocalFiles, "read", stalling)
    changes = {**suites(shards), "data__workers": workers, "train__checkpoint_steps": 100}
    with signalled_when(lambda: len(reads) > 56, number) as sent:
        ended = train(config(shards, run, **changes))
    assert time.monotonic() - sent[0] < LEAVE_SECONDS
    assert ended.signal == number
    steps = len((run / "metrics.jsonl").read_text().splitlines())
    assert max(path.name for path in (run / "checkpoints").iterdir()) == f"step-{steps:09d}"
    assert 1 <= steps <= 7
    back.set()
    monkeypatch.setattr(LocalFiles, "read", read)
    assert train(config(shards, run, **suites(shards)), resume=True).signal is None
    assert_same_end(run, finished)


@pytest.mark.parametrize("step", [6, 8])
def test_an_evaluation_that_stalls_costs_no_step(step: int, shards: Path, finished: Path, tmp_path: Path) -> None:
    """The held-out shards come from a server that hangs, during training and at the end: after a signal the step is
    saved and the run leaves. Resumed, it evaluates first, and ends as if nothing had happened."""
    run, mischief = tmp_path / "run", Mischief()
    every = {"every": 6 if step == 6 else None}
    with serve(shards, mischief) as url:
        settings = suites(url)
        settings["evaluate"].update(every)

        def stalled() -> bool:
            if (run / "checkpoints").is_dir() or not mischief.stall:
                mischief.stall = 10**6 if (run / "metrics.jsonl").exists() else 0
            return (run / "checkpoints" / f"step-{step:09d}").is_dir()

        with signalled_when(stalled) as sent:
            ended = train(config(shards, run, **settings))
        assert time.monotonic() - sent[0] < LEAVE_SECONDS
        assert ended.signal == signal.SIGTERM
        assert not (run / "evaluations.jsonl").exists()
        assert not (run / "model").exists()
        mischief.stall = 0
        ended = train(config(shards, run, **settings), resume=True)
    assert ended.signal is None
    assert list(ended.results) == ["colors/retrieval"]
    assert_same_end(run, finished)
    if step == 6:
        steps = [line.partition(",")[0] for line in (run / "evaluations.jsonl").read_text().splitlines()]
        assert steps == ['{"step": 6', '{"step": 8']


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_a_verb_that_waits_for_a_server_ends(
    number: int, shards: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checking shards of a server that hangs: one line, 128 plus the signal, no traceback. Handlers are as before."""
    before = {number: signal.getsignal(number) for number in system.stop_signals()}
    mischief = Mischief(stall=10**6)
    with (
        serve(shards, mischief) as url,
        signalled_when(lambda: any(".tar" in request for request in mischief.requests), number) as sent,
        pytest.raises(SystemExit) as ended,
    ):
        main(["shards", "check", f"{url}/0.tar"])
    assert time.monotonic() - sent[0] < 30  # the server hangs up after 20 s; in a process of its own it is left
    assert ended.value.code == 128 + number
    said = capfd.readouterr()
    assert f"stopped by signal {number}" in said.err
    assert "Traceback" not in said.err + said.out
    assert {number: signal.getsignal(number) for number in system.stop_signals()} == before


INTERRUPTED = """
import importlib.abc, os, runpy, signal, sys
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, *_):
        if name == {module!r}:
            os.kill(os.getpid(), {number})
sys.meta_path.insert(0, Finder())
sys.argv = ["mmssl", *{words!r}]
runpy.run_module({program!r}, run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    ("program", "module", "words"),
    [
        ("mmssl", "mmssl.cli", ["--help"]),
        ("mmssl", "typer", ["--help"]),
        ("mmssl", "mmssl.cli.train", ["--help"]),
        ("mmssl.train", "mmssl.cli.main", ["--help"]),
        ("mmssl", "numpy", ["eval", "nothing", "nowhere"]),
    ],
)
def test_ctrl_c_while_modules_load_prints_no_traceback(program: str, module: str, words: list[str]) -> None:
    """Pressed at the import of a module, it ends the program with the status of the signal."""
    code = INTERRUPTED.format(module=module, number=int(signal.SIGINT), words=words, program=program)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["thread", "process"])
def test_a_process_whose_server_hangs_leaves_with_its_workers(kind: str, shards: Path, tmp_path: Path) -> None:
    """`mmssl train` on shards of a server that hangs: after a SIGTERM it is gone within 10 seconds, its workers too,
    without a traceback."""
    mischief = Mischief()
    with serve(shards, mischief) as url:
        mischief.stall = 10**6
        words = [f"data.train={url}/{{0,1}}.tar", "data.workers=2", f"data.worker_kind={kind}", "evaluate.suites={}"]
        process = subprocess.Popen(
            [sys.executable, "-m", "mmssl", "train", "configs/ci_tiny.yaml", f"run_dir={tmp_path / 'run'}", *words],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        while not any(".tar bytes" in request for request in mischief.requests):
            assert process.poll() is None
            time.sleep(0.1)
        time.sleep(1)
        children = psutil.Process(process.pid).children(recursive=True)
        assert (len(children) >= 2) == (kind == "process")
        process.send_signal(signal.SIGTERM)
        begin = time.monotonic()
        _, errors = process.communicate(timeout=60)
        assert time.monotonic() - begin < LEAVE_SECONDS
        assert process.returncode == 128 + signal.SIGTERM
        assert "Traceback" not in errors
        assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)
