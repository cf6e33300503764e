"""Shards read from beginning to end: local files, remote files and the output of commands."""

import io
import itertools
import logging
import subprocess
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path

from mmssl.data.shards import BadSample, SampleLimits, ShardIndex, is_remote
from mmssl.data.shards.account import Account
from mmssl.data.shards.causes import leave_out
from mmssl.data.shards.damage import describe_foreign, describe_tail
from mmssl.data.shards.groups import Group, begins_hole, cut_reason, groups
from mmssl.data.shards.headers import TarError
from mmssl.data.shards.samples import SampleError, group_sample
from mmssl.data.shards.shard_index import index_archive
from mmssl.data.shards.tar import Archive
from mmssl.data.storage.fetch import Fetcher
from mmssl.errors import UserError
from mmssl.files import open_regular
from mmssl.types import PipeCommand, Sample

_PIECE = 1 << 20
_ENDLESS = 1 << 62
_log = logging.getLogger(__name__)


def iter_samples(
    shards: Sequence[str],
    limits: SampleLimits | None = None,
    *,
    need_text: bool = True,
    on_bad: Callable[[BadSample], None] | None = None,
) -> Iterator[Sample]:
    """All usable samples of local or remote shards, in file order, numbered from 0.

    With `need_text` a sample needs a caption, as for training; without, an image is enough. Unusable samples are
    skipped and passed to `on_bad` (default: counted and logged by cause); an empty `key` means the rest of a shard.
    """
    skipped, fetcher, numbers = _Skipped(), Fetcher(), itertools.count()
    report = on_bad or skipped.add
    try:
        for shard in shards:
            for found, _ in read_shard(shard, limits or SampleLimits(), fetcher, lambda key: next(numbers), need_text):
                if isinstance(found, Sample):
                    yield found
                else:
                    report(found)
    finally:
        skipped.log()


def read_shard(
    shard: str, limits: SampleLimits, fetcher: Fetcher, number: Callable[[str], int], need_text: bool = True
) -> Iterator[tuple[Sample | BadSample, int]]:
    """All samples of a shard in order, good or bad, each with the byte where it ends.

    Args:
        number: gives the id for a key; called in order for the samples that an index would include.

    Raises:
        UserError: the shard is out of reach.
    """
    end = 0
    try:
        for group, content in read_groups(shard, limits, fetcher, need_text):
            end = group.end
            if group.defect is not None:
                yield BadSample(shard, group.key, group.defect), end
                continue
            try:
                found: Sample | BadSample = group_sample(number(group.key), shard, group, content)
            except SampleError as error:
                found = BadSample(shard, group.key, str(error))
            yield found, end
    except ShardDamageError as error:
        yield BadSample(shard, "", str(error)), end
        return
    if end == 0:
        yield BadSample(shard, "", "the shard holds no sample"), end


class _Skipped:
    """Counts unusable samples, to log one line per cause instead of one per sample."""

    def __init__(self) -> None:
        self._account = Account()

    def add(self, bad: BadSample) -> None:
        if bad.key:
            leave_out(self._account, bad.shard, bad.key, bad.error)
        else:
            _log.warning("%s: %s", bad.shard, bad.error)

    def log(self) -> None:
        for line in self._account.causes():
            _log.warning("%s", line)


def index_forward(shard: str, fetcher: Fetcher, limits: SampleLimits) -> ShardIndex:
    """The index of a remote shard, which is read completely.

    Raises:
        UserError: the shard is out of reach.
    """
    size = fetcher.size(shard)
    with closing(fetcher.stream(shard)) as pieces:
        return index_archive(shard, Archive(_Window(pieces, 0).read, size), 0, limits)


def read_groups(
    shard: str, limits: SampleLimits, fetcher: Fetcher, need_text: bool
) -> Generator[tuple[Group, bytes], None, None]:
    """All groups of a shard with their bytes from the first header; no bytes for those with a defect.

    Raises:
        UserError: the shard is out of reach.
        ShardDamageError: it is damaged; the groups before the damage were yielded.
    """
    is_file = not is_remote(shard)
    with closing(_pieces(shard, fetcher)) as pieces:
        window = _Window(pieces, limits.max_sample_bytes)
        size = Path(shard).stat().st_size if is_file and Path(shard).is_file() else _ENDLESS
        archive = Archive(window.read, size)
        foreign, number, held = describe_foreign(archive), 0, deque[tuple[Group, bytes]]()
        try:
            for group in groups(archive, limits, need_text):
                content = b"" if group.defect is not None else window.read(group.start, group.end - group.start)
                window.forget(group.end)
                number += 1
                held.append((group, content))
                # The last sample of a file is held until its end is known, in case a hole begins in it.
                while len(held) > is_file:
                    yield held.popleft()
        except TarError as error:
            yield from held
            raise ShardDamageError(foreign or f"{error}; the rest of the shard is not used") from None
        tail = describe_tail(archive, number) if held else None
        for group, content in held:
            if tail is not None and archive.end < archive.size and group.defect is None:
                extension, member = next(reversed(group.members.items()))
                begin = member.data - group.start
                cut = begins_hole(extension, content[begin : begin + member.size])
                group.defect = cut_reason(extension) if cut else None
            yield group, content
        if tail is not None:
            raise ShardDamageError(tail)


class ShardDamageError(ValueError):
    """A shard that cannot be read further, or holds something behind its end."""


class _Window:
    """Reads at offsets of a forward-only stream, back to the bytes that were forgotten."""

    def __init__(self, pieces: Iterator[bytes], most: int) -> None:
        self._pieces = pieces
        self._most = most
        self._begin = 0
        self._content = bytearray()

    def read(self, offset: int, count: int) -> bytes:
        """`count` bytes: fewer at the end, none if they were forgotten."""
        while self._begin + len(self._content) < offset + count:
            piece = next(self._pieces, None)
            if piece is None:
                break
            self._content += piece
            # Bytes further back belong to a sample that is refused for its size.
            self.forget(offset - self._most)
        if offset < self._begin:
            return b""
        return bytes(self._content[offset - self._begin : offset - self._begin + count])

    def forget(self, stop: int) -> None:
        """Drop the bytes before `stop`."""
        if stop > self._begin:
            del self._content[: stop - self._begin]
            self._begin = stop


def _pieces(shard: str, fetcher: Fetcher) -> Generator[bytes, None, None]:
    if isinstance(shard, PipeCommand):
        yield from _pipe(shard)
    elif is_remote(shard):
        yield from fetcher.stream(shard)
    else:
        try:
            with open_regular(shard) as file:
                while piece := file.read(_PIECE):
                    yield piece
        except OSError as error:
            raise UserError(f"shard {shard} cannot be read: {error.strerror}") from None


def _pipe(shard: PipeCommand) -> Generator[bytes, None, None]:
    """The output of a shell command.

    Raises:
        UserError: the command failed.
    """
    with subprocess.Popen(shard.command, shell=True, stdout=subprocess.PIPE) as process:
        assert isinstance(process.stdout, io.BufferedReader)
        try:
            while piece := process.stdout.read1(_PIECE):
                yield piece
        except GeneratorExit:
            process.kill()
            raise
    if process.returncode != 0:
        raise UserError(f"{shard} failed with exit status {process.returncode}; run it by hand to see why")
