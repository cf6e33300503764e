"""Names of shards: local paths, URLs and commands."""

import logging
import os
from collections.abc import Sequence

from mmssl.types import PipeCommand

TABLES = (".csv", ".tsv", ".tab", ".txt", ".jsonl", ".ndjson", ".json", ".parquet")
"""Extensions of tables, which are packed into shards and cannot be read as shards."""
COMPRESSED = (".gz", ".bz2", ".xz")
"""Extensions behind those of text tables."""


def table_suffix(name: str) -> str | None:
    """The extension of a table in lower case, without that of its compression. None: the name is not of a table."""
    name = name.lower()
    base = next((name.removesuffix(packed) for packed in COMPRESSED if name.endswith(packed)), name)
    found = next((suffix for suffix in TABLES if base.endswith(suffix)), None)
    return None if found == ".parquet" and base != name else found


_log = logging.getLogger(__name__)

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
"""Endings of the names of tars. Compressed ones are refused with their remedy."""


def is_remote(shard: str) -> bool:
    """True for a URL or a command, False for a local path."""
    return is_command(shard) or "://" in shard


def each_once(shards: Sequence[str]) -> list[str]:
    """The shards without further names of the same local file, such as links to it. A line in the log counts these."""
    files: dict[tuple[int, int], str] = {}
    kept: list[str] = []
    again: list[str] = []
    for shard in shards:
        try:
            status = None if is_remote(shard) else os.stat(shard)  # noqa: PTH116 - a name, not a path
        except OSError:  # the reader says so
            status = None
        # Some network file systems do not number their files.
        if status is not None and status.st_ino and files.setdefault((status.st_dev, status.st_ino), shard) != shard:
            again.append(f"{shard} is another name of {files[status.st_dev, status.st_ino]}")
        else:
            kept.append(shard)
    if again:
        more = f"; so are {len(again) - 1:,} more" if len(again) > 1 else ""
        _log.warning("%s, and is left out: each file counts once%s", again[0], more)
    return kept


def is_command(shard: str) -> bool:
    """True if the shard is the output of a command that the user allowed."""
    return isinstance(shard, PipeCommand)


def is_web(url: str) -> bool:
    """True for a file on a web server."""
    return url.startswith(("http://", "https://"))


def beside(shard: str, suffix: str) -> str:
    """The URL with `suffix` after its path, before its query."""
    path, question, query = shard.partition("?")
    return f"{path}{suffix}{question}{query}"


def in_folder(shard: str, name: str) -> str:
    """The URL of the file `name` in the shard's folder, with the shard's query."""
    path, question, query = shard.partition("?")
    return f"{path.rpartition('/')[0]}/{name}{question}{query}"


def file_name(shard: str) -> str:
    """The last component of a URL's path."""
    return shard.partition("?")[0].rpartition("/")[2]
