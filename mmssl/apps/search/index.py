"""A folder of image embeddings: INDEX/index.json, and per shard parts/NUMBER.npy and parts/NUMBER.parquet.

The embeddings have unit length, float16 [n, D]; the table has shard, key and caption of each row. A part is complete
when its .npy exists, because the table is written first. The record names the shards, the number of each one's part,
and the size and time of change that the shard had; a changed shard gets a new part.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mmssl.apps.search.nearest import Embeddings, Graph, Matches, exact_nearest, locate, part_starts
from mmssl.data import MemberNames
from mmssl.errors import UserError, one_line
from mmssl.files import atomic_write, sha256, write_json

if TYPE_CHECKING:
    from mmssl.inference import Model

_log = logging.getLogger(__name__)
FORMAT = 2
RECORD, PARTS, GRAPH = "index.json", "parts", "graph.usearch"
TABLES = 64
"""Caption tables that stay in memory."""
State = list[int] | None
"""Size and time of change of a shard; None where it cannot be known."""


@dataclass(frozen=True)
class Record:
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

    def write(self, folder: Path) -> None:
        """Replace index.json."""
        write_json(folder / RECORD, {"format": FORMAT, **asdict(self)})


@dataclass(frozen=True)
class Hit:
    """A found image."""

    similarity: float
    """Cosine with the query."""
    shard: str
    key: str
    caption: str


class Index:
    """Stored embeddings of images, with the shard, key and caption of each."""

    def __init__(self, folder: Path | str) -> None:
        """Raises UserError if the folder has no complete index."""
        self.folder = Path(folder)
        record = read_record(self.folder)
        if record is None:
            raise UserError(f"no index at {folder}; make one: mmssl embed MODEL SHARDS --out {folder}")
        self.record = record
        self.shards, self.members = record.shards, record.members
        missing = [
            shard
            for shard, part in zip(self.shards, record.parts, strict=True)
            if not vectors(self.folder, part).is_file()
        ]
        if missing:
            raise UserError(
                f"{folder} lacks {len(missing)} of {len(self.shards)} shards, {missing[0]} first; "
                f"resume with the same mmssl embed command"
            )
        self.parts: list[npt.NDArray[np.float16]] = [
            _read_part(vectors(self.folder, part), record.dim) for part in record.parts
        ]
        self._starts = part_starts(self.parts)
        self._table = lru_cache(TABLES)(
            lambda number: _read_table(table(self.folder, record.parts[number]), len(self.parts[number]))
        )
        self._checked: object = None

    def __len__(self) -> int:
        return int(self._starts[-1])

    def fit(self, model: "Model") -> "Model":
        """The model, or its first dimensions if the index has fewer.

        Raises:
            UserError: the index was made by another model.
        """
        fitting = model.first_dimensions(self.record.dim) if self.record.dim < model.config.embed_dim else model
        self.check(fitting)
        return fitting

    def check(self, model: "Model") -> None:
        """Raises UserError if the index was made by another model, or by other weights of it."""
        # Hashing the weights takes longer than a search: the same tensors, unchanged, are hashed once.
        tensors = [*model.vision.state_dict().values(), *model.encoder.image_projection.state_dict().values()]
        state = [(tensor.data_ptr(), tensor._version) for tensor in tensors]
        if state == self._checked:
            return
        if model.image_fingerprint() != self.record.model:
            raise UserError(
                f"{self.folder} was made by another model or other weights; embed the images again, or give that model"
            )
        self._checked = state

    def nearest(self, queries: Embeddings, k: int = 10, exact: bool | None = None) -> Matches:
        """Row numbers and cosines of the k nearest images to each query [Q, D].

        Args:
            exact: compare with every embedding. Default: True if the index has no graph.

        Raises:
            UserError: the graph is requested but missing, or usearch is not installed.
        """
        path = self.folder / GRAPH
        if exact or (exact is None and not path.is_file()):
            return exact_nearest(queries, self.parts, k, unit=True)
        if not path.is_file():
            raise UserError(f"{self.folder} has no graph; make it: mmssl embed ... --graph")
        return self._graph.nearest(queries, min(k, len(self)))

    def hits(self, rows: Sequence[int], similarities: Sequence[float]) -> list[Hit]:
        """Shard, key and caption of rows, with the given similarities."""
        found = []
        numbers, places = locate(self._starts, np.asarray(rows, dtype=np.int64))
        for number, place, similarity in zip(numbers.tolist(), places.tolist(), similarities, strict=True):
            entry = self._table(number).slice(place, 1).to_pylist()[0]
            found.append(Hit(float(similarity), self.shards[number], entry["key"], entry["caption"]))
        return found

    def embedding(self, row: int) -> npt.NDArray[np.float32]:
        """The stored embedding of an image, [D]."""
        number, place = locate(self._starts, np.asarray(row))
        return np.asarray(self.parts[int(number)][int(place)], dtype=np.float32)

    @cached_property
    def _graph(self) -> Graph:
        path = self.folder / GRAPH
        if _sealed(path):
            return Graph.open(path, self.parts)
        # The library follows the numbers in the file without checks: a damaged one ends the process.
        _log.warning("%s does not match its checksum: it is built again from the embeddings", path)
        return self._build_graph()

    def build_graph(self) -> None:
        """Write the graph for fast search of a large index.

        Raises:
            UserError: usearch is not installed.
        """
        self._graph = self._build_graph()

    def _build_graph(self) -> Graph:
        path = self.folder / GRAPH
        try:
            graph = Graph.build(self.parts, self.record.dim, path)
            write_json(seal(path), {"sha256": sha256(path)})
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}; search with --exact") from None
        return graph


def read_record(folder: Path) -> Record | None:
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
        record = Record(
            model=_text(tree["model"]),
            dim=_number(tree["dim"]),
            shards=[_text(shard) for shard in _list(tree["shards"])],
            parts=[_number(part) for part in _list(tree["parts"])],
            states=[None if s is None else [_number(entry) for entry in _list(s)] for s in _list(tree["states"])],
            members=MemberNames(*(tuple(map(_text, _list(members[kind]))) for kind in ("image", "caption"))),
        )
    except (LookupError, TypeError) as error:
        raise UserError(f"{folder / RECORD} is damaged ({one_line(error)}); embed into another folder") from None
    if record.dim < 1 or not record.shards or not len(record.shards) == len(record.parts) == len(record.states):
        raise UserError(f"{folder / RECORD} is damaged: its lists do not fit together; embed into another folder")
    return record


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


def is_whole(folder: Path, number: int, dim: int) -> bool:
    """True if a part exists and can be read."""
    if not (vectors(folder, number).is_file() and table(folder, number).is_file()):  # a named pipe would block
        return False
    try:
        _read_table(table(folder, number), len(_read_part(vectors(folder, number), dim)))
    except UserError:
        return False
    return True


def vectors(folder: Path, number: int) -> Path:
    """Path of the embeddings of a part."""
    return folder / PARTS / f"{number:06}.npy"


def table(folder: Path, number: int) -> Path:
    """Path of the table of a part: shard, key and caption of each row."""
    return vectors(folder, number).with_suffix(".parquet")


def _read_part(path: Path, dim: int) -> npt.NDArray[np.float16]:
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


def _read_table(path: Path, rows: int) -> Any:
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


def seal(graph: Path) -> Path:
    """The file beside a graph that holds its checksum."""
    return graph.with_suffix(".json")


def _sealed(graph: Path) -> bool:
    """True if a graph is as it was built."""
    try:
        expected = json.loads(seal(graph).read_text(encoding="utf-8"))["sha256"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False
    return bool(expected == sha256(graph))


def write_part(folder: Path, number: int, embeddings: npt.NDArray[np.float16], columns: dict[str, list[str]]) -> None:
    """Store a shard completely or not at all."""
    import pyarrow

    # Named types: a shard without images has no values to take them from.
    texts = pyarrow.table(columns, schema=pyarrow.schema([(name, pyarrow.string()) for name in columns]))
    for path, write in (
        (table(folder, number), lambda partial: _parquet().write_table(texts, partial)),
        (vectors(folder, number), lambda partial: _save(partial, embeddings)),
    ):
        atomic_write(path, write)


def _save(path: Path, embeddings: npt.NDArray[np.float16]) -> None:
    with path.open("wb") as file:  # np.save would add .npy to the name
        np.save(file, embeddings)


def _parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError("indexes need pyarrow: pip install 'mmssl[search]'") from None
    return pyarrow.parquet
