"""A folder of image embeddings: INDEX/index.json, and per shard parts/NUMBER.npy and parts/NUMBER.parquet.

The embeddings have unit length, float16 [n, D]; the table has shard, key and caption of each row. A part is complete
when its .npy exists, because the table is written first.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from mmssl.apps.search.nearest import Embeddings, Graph, Matches, exact_nearest, locate, part_starts
from mmssl.data import MemberNames
from mmssl.errors import UserError, one_line
from mmssl.files import atomic_write, sha256, write_json
from mmssl.rng import torch_generator

if TYPE_CHECKING:
    from mmssl.inference import Model

_log = logging.getLogger(__name__)
FORMAT = 1
RECORD, PARTS, GRAPH = "index.json", "parts", "graph.usearch"
TABLES = 64
"""Caption tables that stay in memory."""
SAME = 0.99
"""Smallest cosine with the stored probe at which a model counts as the one that made the index. Devices and precisions
change the probe less, other weights change it more."""


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
        self.shards: list[str] = record["shards"]
        self.members = MemberNames.of(**record.get("members", {}))
        """Members of the shards that hold the image and the caption, beside the usual ones."""
        self.probe = np.array(record["probe"], dtype=np.float32)
        missing = [number for number in range(len(self.shards)) if not part(self.folder, number).is_file()]
        if missing:
            raise UserError(
                f"{folder} lacks {len(missing)} of {len(self.shards)} shards, {self.shards[missing[0]]} first; "
                f"resume with the same mmssl embed command"
            )
        self.parts: list[npt.NDArray[np.float16]] = [
            _read_part(part(self.folder, number), len(self.probe)) for number in range(len(self.shards))
        ]
        self._starts = part_starts(self.parts)
        self._table = lru_cache(TABLES)(lambda number: _read_table(table(self.folder, number), len(self.parts[number])))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def check(self, model: "Model") -> None:
        """Raises UserError if the index was made by another model."""
        own = probe(model)
        if own.shape != self.probe.shape or float(own @ self.probe) < SAME:
            raise UserError(f"{self.folder} was made by another model; embed the images again, or give that model")

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
            graph = Graph.build(self.parts, len(self.probe), path)
            write_json(_seal(path), {"sha256": sha256(path)})
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}; search with --exact") from None
        return graph


def probe(model: "Model") -> npt.NDArray[np.float32]:
    """The model's embedding of a fixed image, which identifies the model, [D]."""
    side = model.vision.image_size
    noise = torch.randint(256, (1, 3, side, side), generator=torch_generator("probe"), dtype=torch.uint8)
    return model.encode_rendered(noise)[0].numpy()


def read_record(folder: Path) -> dict[str, Any] | None:
    """Read index.json; None if it does not exist.

    Raises:
        UserError: it has another format.
    """
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder / RECORD} cannot be read: {one_line(error)}") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found = record.get("format") if isinstance(record, dict) else None
        raise UserError(f"{folder / RECORD} has format {found!r}, this version reads {FORMAT}")
    shards, numbers = record.get("shards"), record.get("probe")
    if not _is_list(shards, str) or not _is_list(numbers, float, int) or not numbers:
        raise UserError(f"{folder / RECORD} is damaged: it lists no shards or no probe; embed again")
    return record


def _is_list(value: Any, *kinds: type) -> bool:
    return isinstance(value, list) and all(type(entry) in kinds for entry in value)


def part(folder: Path, number: int) -> Path:
    """Path of the embeddings of a shard."""
    return folder / PARTS / f"{number:06}.npy"


def table(folder: Path, number: int) -> Path:
    """Path of the table of a shard: shard, key and caption of each row."""
    return part(folder, number).with_suffix(".parquet")


def _read_part(path: Path, dim: int) -> npt.NDArray[np.float16]:
    """The embeddings of a shard, float16 [n, dim], mapped into memory.

    Raises:
        UserError: the file is damaged, or has another shape.
    """
    try:
        # Mode "c" copies on write, which never happens; torch warns of read-only arrays.
        found: npt.NDArray[np.float16] = np.lib.format.open_memmap(path, mode="c")
    except (OSError, ValueError, EOFError, SyntaxError, TypeError, OverflowError, MemoryError) as error:
        raise UserError(f"{path} is damaged: {one_line(error)}; remove it and embed again") from None
    if not isinstance(found, np.ndarray) or found.dtype != np.float16 or found.ndim != 2 or found.shape[1] != dim:
        raise UserError(f"{path} does not hold float16 embeddings of {dim} dimensions; remove it and embed again")
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
        raise UserError(f"{path} is damaged: {one_line(error)}; remove it and its .npy, and embed again") from None
    whole = found.column_names == ["key", "caption"] and texts and not any(c.null_count for c in found.columns)
    if not whole or len(found) != rows:
        raise UserError(
            f"{path} does not hold the keys and captions of {rows} images; remove it and its .npy, and embed again"
        )
    return found


def _seal(graph: Path) -> Path:
    """The file beside a graph that holds its checksum."""
    return graph.with_suffix(".json")


def _sealed(graph: Path) -> bool:
    """True if a graph is as it was built."""
    try:
        expected = json.loads(_seal(graph).read_text(encoding="utf-8"))["sha256"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False
    return bool(expected == sha256(graph))


def write_part(folder: Path, number: int, embeddings: npt.NDArray[np.float16], columns: dict[str, list[str]]) -> None:
    """Store a shard completely or not at all."""
    import pyarrow

    for path, write in (
        (table(folder, number), lambda partial: _parquet().write_table(pyarrow.table(columns), partial)),
        (part(folder, number), lambda partial: _save(partial, embeddings)),
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
