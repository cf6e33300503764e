"""Patterns of shards, expanded to a list of names: braces, globs, folders and URLs."""

import itertools
import os
import re
from collections.abc import Sequence
from glob import glob, has_magic
from pathlib import Path

from mmssl.data.shards import is_remote
from mmssl.data.shards.urls import ARCHIVES, each_once, is_web, table_suffix
from mmssl.data.sources.braces import expand_braces
from mmssl.data.storage import list_fsspec
from mmssl.errors import UserError
from mmssl.types import PipeCommand

_TRAIN = re.compile(r"train(ing)?[-_.\d]", re.IGNORECASE)
_SPLITS = "val|valid|validation|test|testing|dev|eval|held[-_]?out|hold[-_]?out"
_HELD_OUT = re.compile(rf"^({_SPLITS})([-_.\d*?]|$)", re.IGNORECASE)


def expand(spec: str | Sequence[str], allow_pipe: bool = False) -> list[str]:
    """Shards named by a pattern or a list of patterns, sorted by name.

    A pattern is a path or URL with braces (`{00000..00009}`, `{a,b}`). File systems that can list also take globs (`*`,
    `?`, `[...]`, `**`). A local folder means the `.tar` files in it. A file with two
    names, such as a link, counts once.

    Raises:
        UserError: nothing matches, a local shard is missing or is a table, a shard is given twice, or a `pipe:`
            command is given without `allow_pipe`.
    """
    patterns = [spec] if isinstance(spec, str) else list(spec)
    names = [name for pattern in patterns for name in _expand_one(pattern, allow_pipe)]
    if not names:
        raise UserError(f"no shards are given ({spec!r}); give a path, a pattern or a list of them")
    table = next((name for name in names if not is_remote(name) and table_suffix(name) is not None), None)
    if table is not None:
        raise UserError(
            f"{table} is a table, not a shard; give .tar files, or pack it: mmssl shards pack {table} --out FOLDER"
        )
    names.sort()
    for first, second in itertools.pairwise(names):
        if first == second:
            raise UserError(f"shard {first} is given twice; give it once (to repeat data, use source weights)")
    return each_once(names)


def folder_shards(folder: Path) -> list[str]:
    """The tars in a folder, whatever the case of their extension; compressed ones too, so that reading names them.

    Raises:
        UserError: there are images with captions as well, of which either would be left out. It says what to type.
    """
    from mmssl.data.packing import holds_pairs  # a training without such a folder does not load the packing

    with os.scandir(folder) as entries:
        names = sorted(e.name for e in entries if e.name.lower().endswith(ARCHIVES) and e.is_file())
    shards = [name for name in names if not name.startswith("._")]
    if shards and holds_pairs(folder):
        raise UserError(
            f"folder {folder} holds images with captions and {len(shards)} .tar file{'s' if len(shards) > 1 else ''}; "
            f"for the shards give '{folder}/*.tar', for the images pack them: mmssl shards pack {folder} --out FOLDER"
        )
    return [str(folder / name) for name in shards]


def set_apart(names: Sequence[str], patterns: Sequence[str]) -> tuple[list[str], list[str]]:
    """Shards to train on, and those of a validation or test split that lie beside them.

    `val-*.tar` beside `train-*.tar` of one folder is set apart, unless a pattern names such a split itself.
    """
    # The last part of a pattern, unless it is a folder: data/test/ may hold anything.
    own = [pattern.rpartition("/")[2] for pattern in patterns if ".tar" in pattern or has_magic(pattern)]
    if any(_HELD_OUT.search(part) for name in own for part in re.split(r"[{},]", name)):
        return list(names), []
    folders = {name.rpartition("/")[0] for name in names if _TRAIN.match(name.rpartition("/")[2])}
    apart = {n for n in names if n.rpartition("/")[0] in folders and _HELD_OUT.match(n.rpartition("/")[2])}
    return [name for name in names if name not in apart], sorted(apart)


def _expand_one(pattern: str, allow_pipe: bool) -> list[str]:
    """The names of one pattern. Commands come from its own text only, never from what it matches."""
    if pattern.startswith(PipeCommand.PREFIX):
        if not allow_pipe:
            raise UserError(
                f"{pattern!r} would run a command; set data.allow_pipe=true to allow it in a training "
                f"(a file of this name is ./{pattern})"
            )
        return [PipeCommand(name) for name in expand_braces(pattern)]
    # os.path, unlike pathlib, accepts names that are too long, such as patterns with many braces.
    if not is_remote(pattern) and os.path.isfile(_path(pattern)):  # noqa: PTH113
        return [str(_path(pattern))]
    return [shard for name in expand_braces(pattern) for shard in (_remote(name) if is_remote(name) else _local(name))]


def _local(name: str) -> list[str]:
    path = _path(name)
    if os.path.isdir(path):  # noqa: PTH112
        found = folder_shards(path)
        if not found:
            raise UserError(
                f"folder {name} has no .tar file; give the folder of the shards, or pack its images: "
                f"mmssl shards pack {name} --out FOLDER"
            )
        return found
    if os.path.isfile(path):  # noqa: PTH113
        return [str(path)]
    if not has_magic(name):
        several = "::" in name or ".tar," in name  # as other programs join patterns
        remedy = "give several patterns one by one, data.train=[A,B] in training" if several else "correct the path"
        raise UserError(f"shard {name} does not exist; {remedy} (the current folder is {Path.cwd()})")
    # Path.glob does not accept absolute patterns.
    matches = glob(str(path), recursive=True)  # noqa: PTH207
    found = sorted(match for match in matches if Path(match).is_file())
    if not found:
        raise UserError(f"no file matches {name}; correct the pattern (the current folder is {Path.cwd()})")
    return found


def _path(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise UserError(f"shard {name}: unknown home folder; write the full path") from None


def _remote(name: str) -> list[str]:
    protocol, _, path = name.partition("://")
    if protocol == "file":
        return _local(path)
    # HTTP cannot list files, and a question mark starts a query.
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
