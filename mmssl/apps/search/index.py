"""A folder of image embeddings: INDEX/index.json, and per shard parts/NUMBER.npy and parts/NUMBER.parquet.

The embeddings have unit length, float16 [n, D]; the table has shard, key and caption of each row. A part is complete
when its .npy exists, because the table is written first.
"""

import json
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
from mmssl.errors import UserError
from mmssl.files import atomic_write
from mmssl.rng import torch_generator

if TYPE_CHECKING:
    from mmssl.inference import Model

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
            # Mode "c" copies on write, which never happens; torch warns of read-only arrays.
            np.load(part(self.folder, number), mmap_mode="c")
            for number in range(len(self.shards))
        ]
        self._starts = part_starts(self.parts)
        self._table = lru_cache(TABLES)(lambda number: _parquet().read_table(table(self.folder, number)))

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
        return Graph.open(self.folder / GRAPH, self.parts)

    def build_graph(self) -> None:
        """Write the graph for fast search of a large index.

        Raises:
            UserError: usearch is not installed.
        """
        self._graph = Graph.build(self.parts, len(self.probe), self.folder / GRAPH)


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
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / RECORD} cannot be read: {error}") from None
    if record.get("format") != FORMAT:
        raise UserError(f"{folder / RECORD} has format {record.get('format')!r}, this version reads {FORMAT}")
    return record


def part(folder: Path, number: int) -> Path:
    """Path of the embeddings of a shard."""
    return folder / PARTS / f"{number:06}.npy"


def table(folder: Path, number: int) -> Path:
    """Path of the table of a shard: shard, key and caption of each row."""
    return part(folder, number).with_suffix(".parquet")


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
