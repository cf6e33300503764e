"""Signals ask a run to stop, once."""

import os
import signal

import pytest

from mmssl.train import signals
from mmssl.train.signals import StopRequest


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
