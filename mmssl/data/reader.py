"""From byte ranges of shards to samples."""

import json
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mmssl.data.grouping import Group, Limits, groups
from mmssl.data.index import windowed
from mmssl.data.tar import Archive, Member, TarError
from mmssl.types import Sample, UserError

_OPEN_FILES = 64
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be used."""

    shard: str
    key: str
    error: str


class SampleError(ValueError):
    """The bytes of a sample are not what the index promised, or a member cannot be parsed."""

    def __init__(self, message: str, key: str | None = None) -> None:
        super().__init__(message)
        self.key = key


class LocalFiles:
    """Positioned reads of local files, the most recently used of which stay open. Not for sharing between
    threads."""

    def __init__(self) -> None:
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
                    raise SampleError(
                        f"the shard ends at byte {start + len(content)}; it changed since it was indexed"
                    )
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
            raise UserError(
                f"shard {shard} cannot be opened: {error.strerror}; restore it and resume"
            ) from None
        if len(self._open) > _OPEN_FILES:
            os.close(self._open.popitem(last=False)[1])
        return self._open[shard]


def parse_sample(number: int, shard: str, content: bytes, limits: Limits, need_text: bool = True) -> Sample:
    """The sample whose tar members fill `content`.

    Raises:
        SampleError: it holds no usable sample.
    """
    archive = Archive(lambda offset, count: content[offset : offset + count], len(content))
    try:
        group = next(groups(archive, limits, need_text), None)
    except TarError as error:
        raise SampleError(f"{error} of the sample; the shard changed since it was indexed") from None
    if group is None or group.defect is not None:
        reason = "no members" if group is None else group.defect
        raise SampleError(f"{reason}; the shard changed since it was indexed")
    try:
        return _sample(number, shard, group, content)
    except SampleError as error:
        raise SampleError(str(error), group.key) from None


def iter_samples(
    shards: Sequence[str],
    limits: Limits | None = None,
    *,
    need_text: bool = True,
    on_bad: Callable[[BadSample], None] | None = None,
) -> Iterator[Sample]:
    """Every usable sample of local shards once, in the order of the files, numbered from 0.

    With `need_text` a sample needs a caption beside its picture, as for training; without, a picture is
    enough. Unusable ones are skipped and given to `on_bad`; `key` is empty where it concerns the rest of a
    shard.
    """
    report = on_bad or _warn
    number = 0
    for shard in shards:
        try:
            file = os.open(shard, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"shard {shard} cannot be opened: {error.strerror}; correct the path") from None
        try:
            archive = Archive(windowed(file), os.fstat(file).st_size)
            for group in groups(archive, limits or Limits(), need_text):
                if group.defect is not None:
                    report(BadSample(shard, group.key, group.defect))
                    continue
                number += 1
                content = os.pread(file, group.end - group.start, group.start)
                try:
                    sample = _sample(number - 1, shard, group, content)
                except SampleError as error:
                    report(BadSample(shard, group.key, str(error)))
                    continue
                yield sample
        except TarError as error:
            report(BadSample(shard, "", f"{error}; the rest of the shard is not used"))
        finally:
            os.close(file)


def _warn(bad: BadSample) -> None:
    _log.warning("%s: sample %r is skipped: %s", bad.shard, bad.key, bad.error)


def _sample(number: int, shard: str, group: Group, content: bytes) -> Sample:
    """`content` begins at the group's first header."""
    image = group.image()
    assert image is not None

    def bytes_of(member: Member) -> bytes:
        begin = member.data - group.start
        if begin + member.size > len(content):
            raise SampleError(f"{member.name!r} is cut")
        return content[begin : begin + member.size]

    fields: dict[str, Any] = {}
    if "json" in group.members:
        fields.update(_parse_json(bytes_of(group.members["json"])))
    for extension in ("txt", "cls"):
        if extension in group.members:
            text = _decode(bytes_of(group.members[extension]), extension)
            fields[extension] = _label(text) if extension == "cls" else text
    return Sample(number, shard, group.key, bytes_of(image), fields)


def _decode(content: bytes, extension: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SampleError(f".{extension} is not UTF-8 (byte {error.start})") from None


def _parse_json(content: bytes) -> dict[str, Any]:
    try:
        tree = json.loads(_decode(content, "json"))
    except RecursionError:
        raise SampleError(".json is nested too deeply") from None
    except ValueError as error:
        raise error if isinstance(error, SampleError) else SampleError(f".json is damaged: {error}") from None
    if not isinstance(tree, dict):
        raise SampleError(f".json holds a {type(tree).__name__} instead of an object")
    return tree


def _label(text: str) -> int | str:
    """A class number; other labels stay text."""
    label = text.strip()
    return int(label) if label.removeprefix("-").isdecimal() and len(label) < 19 else label
