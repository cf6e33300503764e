"""An index: stored embeddings of images (inference/stored.py), found by their nearness to a query."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mmssl.apps.search.nearest import Embeddings, Graph, Matches, exact_nearest, locate, part_starts
from mmssl.errors import UserError
from mmssl.files import sha256, write_json
from mmssl.inference import stored

if TYPE_CHECKING:
    from mmssl.inference import Model

_log = logging.getLogger(__name__)
GRAPH = "graph.usearch"
TABLES = 64
"""Caption tables that stay in memory."""


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
        record = stored.read_record(self.folder)
        if record is None:
            raise UserError(f"no index at {folder}; make one: mmssl embed MODEL SHARDS --out {folder}")
        self.record = record
        self.shards, self.members = record.shards, record.members
        missing = [
            shard
            for shard, part in zip(self.shards, record.parts, strict=True)
            if not stored.vectors(self.folder, part).is_file()
        ]
        if missing:
            raise UserError(
                f"{folder} lacks {len(missing)} of {len(self.shards)} shards, {missing[0]} first; "
                f"resume with the same mmssl embed command"
            )
        self.parts: list[npt.NDArray[np.float16]] = [
            stored.read_part(stored.vectors(self.folder, part), record.dim) for part in record.parts
        ]
        self._starts = part_starts(self.parts)
        self._table = lru_cache(TABLES)(
            lambda number: stored.read_table(stored.table(self.folder, record.parts[number]), len(self.parts[number]))
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

    def distinct(self, query: Embeddings, k: int, limit: float, exact: bool | None = None) -> Matches:
        """As `nearest` for one query [1, D], without images that are nearly the same as a nearer one.

        Of images whose cosine with each other is above `limit`, the nearest to the query stays. There are fewer than k
        if the index has no more.

        Raises:
            UserError: as for `nearest`.
        """
        wanted, count = k, len(self)
        while True:
            wanted = min(max(2 * wanted, 32), count)
            rows, similarities = self.nearest(query, wanted, exact)
            kept = self._distinct(rows[0], k, limit)
            if len(kept) == k or wanted == count or rows.shape[1] < wanted:
                return rows[:, kept], similarities[:, kept]

    def _distinct(self, rows: npt.NDArray[np.int64], k: int, limit: float) -> list[int]:
        """Places of the first k rows that are not too similar to an earlier one of them."""
        kept: list[int] = []
        chosen = np.empty((k, self.record.dim), dtype=np.float32)
        for place, row in enumerate(rows.tolist()):
            embedding = self.embedding(row)
            if len(kept) == 0 or float((chosen[: len(kept)] @ embedding).max()) <= limit:
                chosen[len(kept)] = embedding
                kept.append(place)
                if len(kept) == k:
                    break
        return kept

    def write_parquet(self, path: Path) -> None:
        """Write one table for other stores: shard, key, caption, and the embedding as a list of float32.

        Raises:
            UserError: pyarrow is missing, a part is damaged, or the file cannot be written.
        """
        stored.write_parquet(
            path,
            self.record.dim,
            ((shard, self._table(number), self.parts[number]) for number, shard in enumerate(self.shards)),
        )

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
