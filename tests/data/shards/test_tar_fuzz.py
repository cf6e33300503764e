"""No byte of a hostile tar is used that Python's tarfile and GNU tar do not see under the same name."""

import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest

from mmssl.data import iter_samples
from mmssl.data.shards import BadSample, SampleLimits
from mmssl.data.shards.headers import TarError
from mmssl.data.shards.joining import scattered_groups
from mmssl.data.shards.members import split_name
from mmssl.data.shards.samples import SampleError, parse_sample
from mmssl.data.shards.shard_index import index_archive
from mmssl.data.shards.tar import Archive
from tests.helpers.hostile_tars import View, by_gnu_tar, by_tarfile, hostile_tar
from tests.helpers.memory import grows_less_than

LIMITS = SampleLimits(100_000)
SECONDS = 2.0
"""Longest time for one archive of some kilobytes."""
GROWTH = 100 << 20
"""Bytes by which the process may grow over all archives."""
IS_GNU = b"GNU tar" in subprocess.run(["tar", "--version"], capture_output=True, check=False).stdout


def archive_of(content: bytes) -> Archive:
    return Archive(lambda offset, count: content[offset : offset + count], len(content))


def members(content: bytes) -> View:
    """The members that mmssl accepts."""
    found: View = []
    try:
        for member in archive_of(content).members():
            if member.refused is None:
                found.append((member.name, content[member.data : member.data + member.size]))
    except TarError:
        return found
    return found


def samples(content: bytes) -> tuple[View, list[str]]:
    """The images and captions that an index leads to, as files; and all that is said to be wrong."""
    index = index_archive("x.tar", archive_of(content), 0, LIMITS)
    wrong = [*index.problems, *(out.reason for out in index.left_out)]
    found: View = []
    for number, (start, stop) in enumerate(zip(*index.ranges(), strict=True)):
        try:
            sample = parse_sample(number, "x.tar", content[start:stop], LIMITS)
        except SampleError as error:
            wrong.append(str(error))
            continue
        found += [(f"{sample.key}.jpg", sample.image), (f"{sample.key}.txt", sample.fields["txt"].encode())]
    return found, wrong


def scattered(content: bytes) -> View:
    """The members of the samples that `mmssl shards pack` joins from anywhere in a shard."""
    found: View = []
    try:
        for group in scattered_groups(archive_of(content), LIMITS):
            if group.defect is None:
                found += [(m.name, content[m.data : m.data + m.size]) for m in group.members.values()]
    except TarError:
        return found
    return found


def sequential(shard: Path) -> View:
    """The samples of a shard that is read without an index, as files."""
    bad: list[BadSample] = []
    return [
        file
        for sample in iter_samples([str(shard)], LIMITS, on_bad=bad.append)
        for file in ((f"{sample.key}.jpg", sample.image), (f"{sample.key}.txt", sample.fields["txt"].encode()))
    ]


def check(shard: Path, views: dict[str, View], seed: int) -> str:
    """Compare what is accepted with what others see; the outcome as a word."""
    begin, content = time.process_time(), shard.read_bytes()
    used, wrong = samples(content)
    accepted = {
        "members": members(content),
        "samples": used,
        "packed samples": scattered(content),
        "samples without an index": sequential(shard),
    }
    assert time.process_time() - begin < SECONDS, seed
    for reader, view in views.items():
        seen = Counter(view)
        for what, files in accepted.items():
            assert not Counter(files) - seen, f"seed {seed}: {what} that {reader} does not see"
    lost = Counter(file for file in views["tarfile"] if split_name(file[0]) is not None) - Counter(used)
    assert wrong or not lost, f"seed {seed}: lost in silence"
    return "cut" if wrong and used else "refused" if wrong else "whole"


def run(seeds: range, folder: Path) -> Counter[str]:
    outcomes: Counter[str] = Counter()
    names = [f"{number}.tar" for number in range(min(250, len(seeds)))]
    for first in range(seeds.start, seeds.stop, len(names)):
        for number, name in enumerate(names):
            (folder / name).write_bytes(hostile_tar(first + number))
        views = {"tarfile": [by_tarfile((folder / name).read_bytes()) for name in names]}
        if IS_GNU:
            views["GNU tar"] = by_gnu_tar(folder, names)
        for number, name in enumerate(names):
            found = {reader: view[number] for reader, view in views.items()}
            outcomes[check(folder / name, found, first + number)] += 1
    return outcomes


def test_no_bytes_that_others_do_not_see(tmp_path: Path) -> None:
    """250 mutated archives: the members, the samples of the index and what is packed are those of tarfile and GNU tar.
    The mutations leave some archives whole, and damage others at their begin and further on."""
    outcomes = run(range(250), tmp_path)
    assert min(outcomes[kind] for kind in ("whole", "cut", "refused")) > 10, outcomes


@pytest.mark.slow
def test_no_bytes_that_others_do_not_see_in_10_000_archives(tmp_path: Path) -> None:
    """As above, without a crash or a hang, and the process does not grow."""
    with grows_less_than(GROWTH):
        outcomes = run(range(1000, 11_000), tmp_path)
    assert outcomes.total() == 10_000
    assert min(outcomes.values()) > 1000, outcomes
