"""From what a user writes to a list of shards: braces, globs, folders, URLs."""

import itertools
import os
import re
from collections.abc import Iterator, Sequence
from glob import glob, has_magic
from pathlib import Path

from mmssl.data.shards.urls import TABLES, is_remote, is_web
from mmssl.data.storage.filesystem import list_fsspec
from mmssl.errors import UserError

_MAX_NAMES = 2_000_000
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(\d+))?")


def expand(spec: str | Sequence[str], allow_pipe: bool = False) -> list[str]:
    """Shards named by a pattern or a list of patterns, sorted by name.

    A pattern is a path or URL with braces (`{00000..00009}`, `{a,b}`) and, where the file system can list,
    globs (`*`, `?`, `[...]`, `**`). A local folder stands for the `.tar` files in it.

    Raises:
        UserError: nothing matches, a named local shard is missing or is a table, a shard is named twice, or a
            `pipe:` command is given without `allow_pipe`.
    """
    patterns = [spec] if isinstance(spec, str) else list(spec)
    names = [name for pattern in patterns for name in _expand_one(pattern, allow_pipe)]
    if not names:
        raise UserError(f"no shards are named ({spec!r}); give a path, a pattern or a list of them")
    table = next((name for name in names if not is_remote(name) and Path(name).suffix in TABLES), None)
    if table is not None:
        raise UserError(
            f"{table} is a table and no shard; name .tar files, or make some of it: mmssl shards pack {table} --out "
            f"FOLDER"
        )
    names.sort()
    for first, second in itertools.pairwise(names):
        if first == second:
            raise UserError(f"shard {first} is named twice; name each once (weights of sources repeat data)")
    return names


def braces(pattern: str) -> Iterator[str]:
    """Expand `{a,b}` and `{00..10..2}` like a shell; a brace that is neither stays as it is."""
    opening = _first_group(pattern)
    if opening is None:
        yield pattern
        return
    start, stop, options = opening
    for option in options:
        for tail in braces(pattern[stop:]):
            for head in braces(option):
                yield pattern[:start] + head + tail


def _first_group(pattern: str) -> tuple[int, int, Sequence[str]] | None:
    for start in (match.start() for match in re.finditer(r"\{", pattern)):
        depth, cuts = 0, [start]
        for position in range(start, len(pattern)):
            character = pattern[position]
            depth += {"{": 1, "}": -1}.get(character, 0)
            if (character == "," and depth == 1) or depth == 0:
                cuts.append(position)
            if depth == 0:
                break
        else:
            continue
        bounds = _RANGE.fullmatch(pattern[start + 1 : cuts[-1]])
        if bounds is not None:
            return start, cuts[-1] + 1, _numbers(bounds, pattern)
        if len(cuts) > 2:
            return start, cuts[-1] + 1, [pattern[a + 1 : b] for a, b in itertools.pairwise(cuts)]
    return None


def _numbers(bounds: re.Match[str], pattern: str) -> list[str]:
    first, last, step = bounds[1], bounds[2], max(1, int(bounds[3] or 1))
    low, high = int(first), int(last)
    if abs(high - low) // step >= _MAX_NAMES:
        raise UserError(f"pattern {pattern} names more than {_MAX_NAMES:,} shards; shorten the range")
    has_zeros = any(len(text.lstrip("-")) > 1 and text.lstrip("-")[0] == "0" for text in (first, last))
    width = max(len(first), len(last)) if has_zeros else 0
    numbers = range(low, high + 1, step) if low <= high else range(low, high - 1, -step)
    return [f"{number:0{width}d}" for number in numbers]


def _expand_one(pattern: str, allow_pipe: bool) -> list[str]:
    if pattern.startswith("pipe:"):
        if not allow_pipe:
            raise UserError(f"{pattern!r} would run a command; set data.allow_pipe=true to allow that")
        return list(braces(pattern))
    # Unlike pathlib, os.path takes names that are too long, as patterns with many braces are, for no files.
    if not is_remote(pattern) and os.path.isfile(_path(pattern)):  # noqa: PTH113
        return [str(_path(pattern))]
    names = list(itertools.islice(braces(pattern), _MAX_NAMES + 1))
    if len(names) > _MAX_NAMES:
        raise UserError(f"pattern {pattern} names more than {_MAX_NAMES:,} shards; shorten its ranges")
    return [shard for name in names for shard in (_remote(name) if is_remote(name) else _local(name))]


def _local(name: str) -> list[str]:
    path = _path(name)
    if os.path.isdir(path):  # noqa: PTH112
        found = [str(child) for child in sorted(path.glob("*.tar")) if child.is_file()]
        if not found:
            raise UserError(
                f"folder {name} holds no .tar file; give the folder of the shards, or make some of its images: mmssl "
                f"shards pack {name} --out FOLDER"
            )
        return found
    if os.path.isfile(path):  # noqa: PTH113
        return [str(path)]
    if not has_magic(name):
        raise UserError(f"shard {name} does not exist; correct the path (the current folder is {Path.cwd()})")
    # Path.glob takes no absolute patterns.
    matches = glob(str(path), recursive=True)  # noqa: PTH207
    found = sorted(match for match in matches if Path(match).is_file())
    if not found:
        raise UserError(f"no file matches {name}; correct the pattern (the current folder is {Path.cwd()})")
    return found


def _path(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise UserError(f"shard {name}: there is no such user's folder; write the path in full") from None


def _remote(name: str) -> list[str]:
    protocol, _, path = name.partition("://")
    if protocol == "file":
        return _local(path)
    # HTTP has no listing, and a question mark there begins a query.
    if is_web(name):
        if "*" in name:
            raise UserError(f"{name}: a web server does not list files; use braces such as {{00000..00099}}")
        return [name]
    if not has_magic(name):
        return [name]
    found = list_fsspec(name)
    if not found:
        raise UserError(f"no file matches {name}; correct the pattern")
    return found
