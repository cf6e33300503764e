"""Shards are read and assessed; nothing is written."""

from pathlib import Path

import pytest

from mmssl.apps.doctor import examine_shards
from mmssl.apps.doctor.shards import (
    READ_BYTES,
    check_index,
    check_latency,
    check_read_speed,
    check_remote_index,
    read,
    spread,
)
from mmssl.data.shards import SampleLimits, index_shards
from tests.helpers.http_servers import serve
from tests.helpers.tiny_runs import write_pairs


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two tars."""
    return write_pairs(tmp_path)


def test_speed_and_latency_are_assessed() -> None:
    """100 MB in one second are enough, 10 are not; so are 10 ms and a second until the first byte."""
    fast, slow = check_read_speed(3, 10**8, 1.0), check_read_speed(3, 10**7, 1.0)
    assert (fast.state, fast.remedy) == ("ok", "")
    assert "100 MB/s" in fast.found
    assert slow.state == "warning"
    assert "data.slice_mib" in slow.remedy
    assert (check_latency(2, 0.01).state, check_latency(2, 1.0).state) == ("ok", "warning")


def test_an_index_that_cannot_be_stored_is_a_warning() -> None:
    """Missing where the first training makes it is fine; missing where nothing can be written costs every start."""
    assert check_index(2, [], True).state == "ok"
    assert check_index(2, ["a.tar"], True).state == "ok"
    assert "missing for 1 of 2 shards, first a.tar" in check_index(2, ["a.tar"], False).found
    assert check_index(2, ["a.tar"], False).state == "warning"
    assert "resume" in check_remote_index(2, ["a"]).remedy


def test_a_sample_of_many_is_read(tmp_path: Path) -> None:
    """Four of many shards are read, evenly spread, and at most READ_BYTES of each."""
    names = [str(number) for number in range(10)]
    assert spread(names) == ["0", "2", "5", "7"]
    assert spread(names[:3]) == ["0", "1", "2"]
    large, small = tmp_path / "large", tmp_path / "small"
    large.write_bytes(bytes(READ_BYTES + 5))
    small.write_bytes(bytes(7))
    count, seconds = read([str(large), str(small)])
    assert count == READ_BYTES + 7
    assert seconds > 0


def test_local_shards_are_left_as_they_are(shards: Path) -> None:
    """The speed is reported; a missing index is reported but not created; a present one is reported."""
    before = sorted(path.name for path in shards.iterdir())
    speed, index = examine_shards([str(shards / "*.tar")])
    assert speed.found.startswith("2 local, read at ")
    assert "missing for 2 of 2" in index.found
    assert sorted(path.name for path in shards.iterdir()) == before
    index_shards([str(path) for path in sorted(shards.glob("*.tar"))], SampleLimits())
    assert "present for all 2" in examine_shards([str(shards / "*.tar")])[1].found


def test_missing_shards_are_an_error(tmp_path: Path) -> None:
    """The finding names the pattern."""
    (found,) = examine_shards([str(tmp_path / "none-*.tar")])
    assert (found.name, found.state) == ("shards", "error")
    assert "none-*.tar" in found.found


def test_remote_shards_are_examined(shards: Path) -> None:
    """Over HTTP the latency and a missing index are reported; nothing is written."""
    before = sorted(path.name for path in shards.iterdir())
    with serve(shards) as url:
        latency, index = examine_shards([url + "/{0,1}.tar"])
        assert latency.name == "remote shards"
        assert latency.state == "ok"
        assert "missing for 2 of the 2" in index.found
        assert sorted(path.name for path in shards.iterdir()) == before
        index_shards([str(path) for path in sorted(shards.glob("*.tar"))], SampleLimits())
        assert examine_shards([url + "/{0,1}.tar"])[1].state == "ok"
        (gone,) = examine_shards([url + "/none.tar"])
        assert gone.state == "error"
        assert "none.tar" in gone.found
