"""Stored embeddings: FOLDER/index.json, and per shard parts/NUMBER.npy and parts/NUMBER.parquet.

The embeddings of images have unit length, float16 [n, D]; the table has shard, key and caption of each row. With texts,
NUMBER.text.npy has the embeddings of the captions. A part is complete when its NUMBER.npy exists, because it is written
last. The record names the shards, the number of each one's part, and the size and time of change that the shard had; a
changed shard gets a new part.
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mmssl.data import MemberNames
from mmssl.data.shards import is_remote
from mmssl.errors import UserError, one_line
from mmssl.files import atomic_write, write_json

FORMAT = 2
RECORD, PARTS = "index.json", "parts"
State = list[int] | None
"""Size and time of change of a shard; None where it cannot be known."""


@dataclass(frozen=True)
class EmbeddingRecord:
    """index.json."""

    model: str
    """Fingerprint of the image tower that made the embeddings."""
    dim: int
    shards: list[str]
    parts: list[int]
    """Number of each shard's part."""
    states: list[State]
    """State of each shard when its part was planned."""
    members: MemberNames
    """Members of the shards that hold the image and the caption, beside the usual ones."""
    text_model: str | None = None
    """Fingerprint of the text tower that made the embeddings of captions; None without them."""
    logit_scale: float | None = None
    """Factor of the model from cosines to logits."""

    def write(self, folder: Path) -> None:
        """Replace index.json."""
        write_json(folder / RECORD, {"format": FORMAT, **asdict(self)})


def read_record(folder: Path) -> EmbeddingRecord | None:
    """Read index.json; None if it does not exist.

    Raises:
        UserError: it has another format.
    """
    try:
        tree: Any = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder / RECORD} cannot be read: {one_line(error)}") from None
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        found = tree.get("format") if isinstance(tree, dict) else None
        raise UserError(
            f"{folder / RECORD} has format {found!r}, this version reads {FORMAT}; embed into another folder"
        )
    try:
        members = tree["members"]
        record = EmbeddingRecord(
            model=_text(tree["model"]),
            dim=_number(tree["dim"]),
            shards=[_text(shard) for shard in _list(tree["shards"])],
            parts=[_number(part) for part in _list(tree["parts"])],
            states=[None if s is None else [_number(entry) for entry in _list(s)] for s in _list(tree["states"])],
            members=MemberNames(*(tuple(map(_text, _list(members[kind]))) for kind in ("image", "caption"))),
            text_model=None if tree.get("text_model") is None else _text(tree["text_model"]),
            logit_scale=None if tree.get("logit_scale") is None else float(tree["logit_scale"]),
        )
    except (LookupError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{folder / RECORD} is damaged ({one_line(error)}); embed into another folder") from None
    if record.dim < 1 or not record.shards or not len(record.shards) == len(record.parts) == len(record.states):
        raise UserError(f"{folder / RECORD} is damaged: its lists do not fit together; embed into another folder")
    return record


class PartFinder:
    """Finds the part of a shard by its path, or by its name where that is unique: folders move."""

    def __init__(self, record: EmbeddingRecord) -> None:
        self._shards = dict(zip(record.shards, record.parts, strict=True))
        names = Counter(Path(shard).name for shard in record.shards)
        self._names = {Path(s).name: part for s, part in self._shards.items() if names[Path(s).name] == 1}

    def __call__(self, shard: str) -> int | None:
        """The part of a shard; None if it has none."""
        path = shard if is_remote(shard) else str(Path(shard).resolve())
        return self._shards.get(path, self._names.get(Path(shard).name))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{str(value)[:40]!r} is no text")
    return value


def _number(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"{str(value)[:40]!r} is no number")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{str(value)[:40]!r} is no list")
    return value


def is_whole(folder: Path, number: int, record: EmbeddingRecord) -> bool:
    """True if a part exists and can be read."""
    files = [vectors(folder, number), table(folder, number)]
    if record.text_model is not None:
        files.append(text_vectors(folder, number))
    if not all(file.is_file() for file in files):  # a named pipe would block
        return False
    try:
        rows = len(read_part(files[0], record.dim))
        read_table(files[1], rows)
        return all(len(read_part(file, record.dim)) == rows for file in files[2:])
    except UserError:
        return False


def vectors(folder: Path, number: int) -> Path:
    """Path of the embeddings of a part."""
    return folder / PARTS / f"{number:06}.npy"


def text_vectors(folder: Path, number: int) -> Path:
    """Path of the embeddings of a part's captions."""
    return vectors(folder, number).with_suffix(".text.npy")


def table(folder: Path, number: int) -> Path:
    """Path of the table of a part: shard, key and caption of each row."""
    return vectors(folder, number).with_suffix(".parquet")


def read_part(path: Path, dim: int) -> npt.NDArray[np.float16]:
    """The embeddings of a shard, float16 [n, dim], mapped into memory.

    Raises:
        UserError: the file is damaged, or has another shape.
    """
    try:
        # Mode "c" copies on write, which never happens; torch warns of read-only arrays.
        found: npt.NDArray[np.float16] = np.lib.format.open_memmap(path, mode="c")
    except (OSError, ValueError, EOFError, SyntaxError, TypeError, OverflowError, MemoryError) as error:
        raise UserError(f"{path} is damaged: {one_line(error)}; embed again: it is made anew") from None
    if not isinstance(found, np.ndarray) or found.dtype != np.float16 or found.ndim != 2 or found.shape[1] != dim:
        raise UserError(f"{path} does not hold float16 embeddings of {dim} dimensions; embed again: it is made anew")
    return found


def read_table(path: Path, rows: int) -> Any:
    """The keys and captions of a shard.

    Raises:
        UserError: the file is missing or damaged, or has another number of rows.
    """
    pyarrow = _parquet()
    try:
        found = pyarrow.read_table(path, columns=["key", "caption"])
        texts = all(str(field.type) in ("string", "large_string") for field in found.schema)
    except (OSError, ValueError, KeyError, NotImplementedError, RuntimeError, MemoryError) as error:
        raise UserError(f"{path} is damaged: {one_line(error)}; embed again: it is made anew") from None
    whole = found.column_names == ["key", "caption"] and texts and not any(c.null_count for c in found.columns)
    if not whole or len(found) != rows:
        raise UserError(f"{path} does not hold the keys and captions of {rows} images; embed again: it is made anew")
    return found


def write_part(
    folder: Path,
    number: int,
    embeddings: npt.NDArray[np.float16],
    columns: dict[str, list[str]],
    text_embeddings: npt.NDArray[np.float16] | None = None,
) -> None:
    """Store a shard completely or not at all."""
    import pyarrow

    # Named types: a shard without images has no values to take them from.
    texts = pyarrow.table(columns, schema=pyarrow.schema([(name, pyarrow.string()) for name in columns]))
    atomic_write(table(folder, number), lambda partial: _parquet().write_table(texts, partial))
    if text_embeddings is not None:
        atomic_write(text_vectors(folder, number), lambda partial: _save(partial, text_embeddings))
    atomic_write(vectors(folder, number), lambda partial: _save(partial, embeddings))


def write_parquet(path: Path, dim: int, parts: Iterable[tuple[str, Any, npt.NDArray[np.float16]]]) -> None:
    """Write shard, key, caption and embedding of all rows as one Parquet table, completely or not at all.

    Args:
        parts: shard, the table of `read_table`, and the embeddings [n, dim] of each part.

    Raises:
        UserError: the file cannot be written.
    """
    import pyarrow

    texts = [(name, pyarrow.string()) for name in ("shard", "key", "caption")]
    schema = pyarrow.schema([*texts, ("embedding", pyarrow.list_(pyarrow.float32(), dim))])

    def write(partial: Path) -> None:
        with _parquet().ParquetWriter(partial, schema) as writer:
            for shard, table, embeddings in parts:
                flat = pyarrow.array(np.asarray(embeddings, dtype=np.float32).ravel())
                columns = [
                    pyarrow.array([shard] * len(table), pyarrow.string()),
                    *(table.column(name).cast(pyarrow.string()).combine_chunks() for name in ("key", "caption")),
                    pyarrow.FixedSizeListArray.from_arrays(flat, dim),
                ]
                writer.write_table(pyarrow.Table.from_arrays(columns, schema=schema))

    try:
        atomic_write(path, write)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}; give another file") from None


def _save(path: Path, embeddings: npt.NDArray[np.float16]) -> None:
    with path.open("wb") as file:  # np.save would add .npy to the name
        np.save(file, embeddings)


def _parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError("indexes need pyarrow: pip install 'mmssl[search]'") from None
    return pyarrow.parquet
