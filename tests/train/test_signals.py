"""Signals ask a run to stop, once."""

import os
import signal

import pytest
import torch.distributed.run
from torch.distributed.elastic.multiprocessing.api import SignalException

from mmssl.distributed import launch
from mmssl.train import recovery as signals
from mmssl.train.recovery import StopRequest


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
    """torch's launcher raises what stopped it: no traceback, and 128 plus the signal."""

    def stopped(_: list[str]) -> None:
        raise SignalException("stopped", signal.SIGTERM)

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(torch.distributed.run, "main", stopped)
    with pytest.raises(SystemExit) as ended:
        launch.start_processes(2, "mmssl.train", [])
    assert ended.value.code == 128 + 15
