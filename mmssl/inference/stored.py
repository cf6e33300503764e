"""Stored embeddings: FOLDER/index.json, and per shard parts/NUMBER.npy and parts/NUMBER.parquet.

The embeddings of images have unit length, float16 [n, D], or are int8, of which only the direction counts. The table
has shard, key and caption of each row, and its fields, a list of texts each. With texts, NUMBER.text.npy has the
embeddings of the captions. A part is complete when its NUMBER.npy exists, because it is written
last. The record names the shards, the number of each one's part, and the size and time of change that the shard had; a
changed shard gets a new part.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from mmssl.data import MemberNames
from mmssl.data.shards import is_remote
from mmssl.errors import UserError, one_line
from mmssl.files import atomic_write, write_json

FORMAT = 3
RECORD, PARTS = "index.json", "parts"
Dtype = Literal["float16", "int8"]
Rows = npt.NDArray[np.float16] | npt.NDArray[np.int8]
"""Stored embeddings [n, D]; `as_unit` gives the vectors."""
_TEXTS, _LISTS = ("string", "large_string"), ("list<element: string>", "list<item: string>")
"""Types of columns."""
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
    dtype: Dtype = "float16"
    """Number format of the embeddings."""
    fields: list[str] | None = None
    """Names of the stored fields of samples; None: all that are short."""

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
            dtype=tree["dtype"],
            fields=None if tree["fields"] is None else [_text(name) for name in _list(tree["fields"])],
        )
    except (LookupError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{folder / RECORD} is damaged ({one_line(error)}); embed into another folder") from None
    if (
        record.dtype not in get_args(Dtype)
        or record.dim < 1
        or not record.shards
        or not len(record.shards) == len(record.parts) == len(record.states)
    ):
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
        rows = len(read_part(files[0], record))
        read_table(files[1], rows)
        return all(len(read_part(file, record)) == rows for file in files[2:])
    except UserError:
        return False


def vectors(folder: Path, number: int) -> Path:
    """Path of the embeddings of a part."""
    return folder / PARTS / f"{number:06}.npy"


def text_vectors(folder: Path, number: int) -> Path:
    """Path of the embeddings of a part's captions."""
    return vectors(folder, number).with_suffix(".text.npy")


def table(folder: Path, number: int) -> Path:
    """Path of the table of a part: shard, key, caption and fields of each row."""
    return vectors(folder, number).with_suffix(".parquet")


def as_unit(rows: Rows | npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The unit vectors of stored embeddings [..., D], float32."""
    found = np.array(rows, np.float32)  # no memory map, which FAISS would take for a tensor
    if rows.dtype == np.int8:
        found /= np.maximum(np.linalg.norm(found, axis=-1, keepdims=True), 1e-30)
    return found


def rounded(embeddings: npt.NDArray[np.float32], dtype: Dtype) -> Rows:
    """Unit vectors [n, D] as they are stored. For int8 the largest number of each row becomes 127."""
    if dtype == "float16":
        return embeddings.astype(np.float16)
    largest = np.abs(embeddings).max(axis=1, keepdims=True, initial=1e-30)
    found: npt.NDArray[np.int8] = np.rint(embeddings * (127 / largest)).astype(np.int8)
    return found


def read_part(path: Path, record: EmbeddingRecord) -> Rows:
    """The embeddings of a shard, [n, dim], mapped into memory.

    Raises:
        UserError: the file is damaged, or has another shape.
    """
    try:
        # Mode "c" copies on write, which never happens; torch warns of read-only arrays.
        found: Rows = np.lib.format.open_memmap(path, mode="c")
    except (OSError, ValueError, EOFError, SyntaxError, TypeError, OverflowError, MemoryError) as error:
        raise UserError(f"{path} is damaged: {one_line(error)}; embed again: it is made anew") from None
    kind, dim = record.dtype, record.dim
    if not isinstance(found, np.ndarray) or found.dtype != kind or found.ndim != 2 or found.shape[1] != dim:
        raise UserError(f"{path} does not hold {kind} embeddings of {dim} dimensions; embed again: it is made anew")
    return found


def read_table(path: Path, rows: int, columns: Sequence[str] | None = ("key", "caption")) -> Any:
    """Columns of the table of a part, without those that it lacks; None: all but the shard.

    Raises:
        UserError: the file is missing or damaged, or has another number of rows.
    """
    library = _parquet()
    try:
        if not path.is_file():  # a named pipe would block
            raise FileNotFoundError(f"no file {path.name}")
        with library.ParquetFile(path) as file:
            names = [n for n in file.schema_arrow.names if n != "shard" and (columns is None or n in columns)]
            found, count = file.read(names), file.metadata.num_rows
    except (OSError, ValueError, KeyError, NotImplementedError, RuntimeError, MemoryError) as error:
        raise UserError(f"{path} is damaged: {one_line(error)}; embed again: it is made anew") from None
    lacks = [name for name in ("key", "caption") if (columns is None or name in columns) and name not in names]
    if lacks or count != rows or not all(map(_is_whole_column, found.columns)):
        raise UserError(f"{path} does not hold the keys and captions of {rows} images; embed again: it is made anew")
    return found


def _is_whole_column(column: Any) -> bool:
    """True if it holds texts or lists of texts, and nothing is missing."""
    kind = str(column.type)
    if kind in _LISTS:
        return bool(column.null_count + column.combine_chunks().flatten().null_count == 0)
    return bool(kind in _TEXTS and column.null_count == 0)


def field_names(path: Path) -> list[str]:
    """Names of the fields in the table of a part.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        schema = _parquet().read_schema(path) if path.is_file() else ()
    except (OSError, ValueError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{path} is damaged: {one_line(error)}; embed again: it is made anew") from None
    return [field.name for field in schema if str(field.type) in _LISTS]


def write_part(
    folder: Path,
    number: int,
    embeddings: Rows,
    columns: dict[str, list[str]],
    fields: dict[str, list[list[str]]],
    text_embeddings: Rows | None = None,
) -> None:
    """Store a shard completely or not at all.

    Args:
        columns: shard, key and caption of each row.
        fields: name -> the values of each row.
    """
    import pyarrow

    # Named types: a shard without images has no values to take them from.
    names = [(name, pyarrow.string()) for name in columns] + [
        (name, pyarrow.list_(pyarrow.string())) for name in fields
    ]
    texts = pyarrow.table(columns | fields, schema=pyarrow.schema(names))
    atomic_write(table(folder, number), lambda partial: _parquet().write_table(texts, partial))
    if text_embeddings is not None:
        atomic_write(text_vectors(folder, number), lambda partial: _save(partial, text_embeddings))
    atomic_write(vectors(folder, number), lambda partial: _save(partial, embeddings))


def _save(path: Path, embeddings: Rows) -> None:
    with path.open("wb") as file:  # np.save would add .npy to the name
        np.save(file, embeddings)


def _parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError("indexes need pyarrow: pip install 'mmssl[search]'") from None
    return pyarrow.parquet
