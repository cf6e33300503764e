"""Reading shards: at any place of local files, and from beginning to end."""

import itertools
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

from mmssl.data.shards.samples import BadSample, SampleError, SampleLimits, group_sample
from mmssl.data.shards.tar import TarError
from mmssl.data.storage.fetch import Fetcher
from mmssl.data.storage.sequential import read_groups
from mmssl.errors import UserError
from mmssl.types import Sample

__all__ = ["BadSample", "LocalFiles", "iter_samples"]

_log = logging.getLogger(__name__)


class LocalFiles:
    """Positioned reads of local files, the most recently used of which stay open. Not for sharing between
    threads."""

    def __init__(self, most: int = 64) -> None:
        """At most so many files stay open."""
        self._most = most
        self._open: OrderedDict[str, int] = OrderedDict()

    def read(self, shard: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a shard.

        Raises:
            UserError: the file cannot be opened.
            SampleError: the bytes cannot be read.
        """
        file = self._file(shard)
        try:
            content = os.pread(file, stop - start, start)
            while len(content) < stop - start:
                more = os.pread(file, stop - start - len(content), start + len(content))
                if not more:
                    raise SampleError(f"the shard ends at byte {start + len(content)}; it changed since it was indexed")
                content += more
        except OSError as error:
            raise SampleError(f"bytes {start} to {stop} cannot be read: {error.strerror}") from None
        return content

    def close(self) -> None:
        """Close every file."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _file(self, shard: str) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        try:
            self._open[shard] = os.open(shard, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"shard {shard} cannot be opened: {error.strerror}; restore it and resume") from None
        if len(self._open) > self._most:
            os.close(self._open.popitem(last=False)[1])
        return self._open[shard]


def iter_samples(
    shards: Sequence[str],
    limits: SampleLimits | None = None,
    *,
    need_text: bool = True,
    on_bad: Callable[[BadSample], None] | None = None,
) -> Iterator[Sample]:
    """Every usable sample of shards, local or remote, once, in the order of the files, numbered from 0.

    With `need_text` a sample needs a caption beside its image, as for training; without, an image is
    enough. Unusable ones are skipped and given to `on_bad`; `key` is empty where it concerns the rest of a
    shard.
    """
    report, fetcher, numbers = on_bad or _warn, Fetcher(), itertools.count()
    for shard in shards:
        for found, _ in read_shard(shard, limits or SampleLimits(), fetcher, lambda key: next(numbers), need_text):
            if isinstance(found, Sample):
                yield found
            else:
                report(found)


def read_shard(
    shard: str, limits: SampleLimits, fetcher: Fetcher, number: Callable[[str], int], need_text: bool = True
) -> Iterator[tuple[Sample | BadSample, int]]:
    """Every sample of a shard from its beginning to its end, or what is wrong with it, and the byte where it ends.

    Args:
        number: the id of the sample with a key; asked in order for those that an index calls usable.

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
    except TarError as error:
        yield BadSample(shard, "", f"{error}; the rest of the shard is not used"), end
        return
    if end == 0:
        yield BadSample(shard, "", "the shard holds no sample"), end


def _warn(bad: BadSample) -> None:
    _log.warning("%s: sample %r is skipped: %s", bad.shard, bad.key, bad.error)
