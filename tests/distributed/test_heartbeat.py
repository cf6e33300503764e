"""A process that gives no sign of life is noticed, whatever the others wait for."""

import pytest

from mmssl.distributed import World
from mmssl.distributed import heartbeat as peers
from mmssl.distributed.heartbeat import EXIT_CODE, Heartbeat, peer_loss_as_user_error
from mmssl.errors import UserError
from tests.helpers.ranks import on_ranks


def watching(world: World, silent: bool) -> list[int]:
    """Rank 0 watches; rank 1 watches too, or gives no sign of life at all."""
    peers.BEAT_SECONDS, peers.PATIENCE_SECONDS = 0.05, 1.0
    codes: list[int] = []
    if world.rank == 1 and silent:
        world.barrier()
        world.barrier()
        return codes
    with Heartbeat(world, "go on", end=codes.append) as watch:
        world.barrier()
        if silent:
            watch._thread.join()
        else:
            assert not watch._stop.wait(2.0)
    return codes


def test_a_silent_process_ends_the_one_that_watches() -> None:
    """Rank 1 never beats: rank 0 is ended with the error's code."""
    assert on_ranks(2, watching, True) == [[EXIT_CODE], []]


def test_living_processes_are_left_alone() -> None:
    """Two that beat for longer than the patience leave together; alone there is nothing to watch."""
    assert on_ranks(2, watching, False) == [[], []]
    with Heartbeat(World(), "go on"):
        pass


def test_a_broken_connection_is_one_line() -> None:
    """What gloo and NCCL raise becomes a UserError with the remedy; other errors, and those of one process, do not."""
    broken = RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:5")
    with (
        pytest.raises(UserError, match=r"another process of this run is gone .* go on with this"),
        peer_loss_as_user_error(World(0, 2), "go on with this"),
    ):
        raise broken
    with pytest.raises(RuntimeError, match="shapes"), peer_loss_as_user_error(World(0, 2), "x"):
        raise RuntimeError("shapes differ")
    with pytest.raises(RuntimeError, match="Connection closed"), peer_loss_as_user_error(World(), "x"):
        raise broken


def leaving(world: World) -> list[int]:
    """Rank 1 must leave while rank 0 waits for it."""
    peers.BEAT_SECONDS, peers.PATIENCE_SECONDS = 0.05, 60.0
    codes: list[int] = []
    status = 143 if world.rank == 1 else None
    with Heartbeat(world, "go on", lambda: status, end=codes.append) as watch:
        watch._thread.join(20)
        world.barrier()
    return codes


def test_a_process_that_leaves_tells_the_others() -> None:
    """One that was told to stop while all wait for each other ends with its own status; the others need not wait for
    the patience to run out."""
    assert on_ranks(2, leaving) == [[EXIT_CODE], [143]]
