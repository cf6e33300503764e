"""An index: stored embeddings of images (inference/stored.py), found by their nearness to a query."""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mmssl.apps.search.fields import TEXTS, Condition
from mmssl.apps.search.nearest import (
    Embeddings,
    Graph,
    Matches,
    Rows,
    chosen_rows,
    exact_nearest,
    locate,
    part_starts,
    prefix,
)
from mmssl.errors import UserError
from mmssl.files import sha256, write_json
from mmssl.inference import stored

if TYPE_CHECKING:
    from mmssl.inference import Model

_log = logging.getLogger(__name__)
GRAPH = "graph.usearch"
TABLES = 64
"""Caption tables that stay in memory."""
SELECTIONS = 4
"""Row numbers of selections that stay in memory."""


@dataclass(frozen=True)
class Hit:
    """A found image."""

    similarity: float
    """Cosine with the query."""
    shard: str
    key: str
    caption: str
    fields: dict[str, str | list[str]] = field(default_factory=dict)
    """Further fields of its sample."""


class Index:
    """Stored embeddings of images, with the shard, key, caption and fields of each."""

    def __init__(self, folder: Path | str, dim: int | None = None) -> None:
        """Args:
            dim: search with the first dimensions only, which are read into memory.

        Raises:
            UserError: the folder has no complete index, or fewer dimensions.
        """
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
        self.dim = dim or record.dim
        if self.dim > record.dim:
            raise UserError(f"--dim {dim}: {folder} has embeddings of {record.dim} dimensions; give 1 to {record.dim}")
        whole = (stored.read_part(stored.vectors(self.folder, part), record) for part in record.parts)
        self.parts: list[Embeddings] = [prefix(p, self.dim) if self.dim < record.dim else p for p in whole]
        self._starts = part_starts(self.parts)
        self._table = lru_cache(TABLES)(lambda number: self._columns(number, None))
        self._selection = lru_cache(SELECTIONS)(self._select)
        self._checked: object = None

    def __len__(self) -> int:
        return int(self._starts[-1])

    def fit(self, model: "Model") -> "Model":
        """The model, or its first dimensions if the index has fewer or is searched with fewer.

        Raises:
            UserError: the index was made by another model.
        """
        fitting = model.first_dimensions(self.record.dim) if self.record.dim < model.config.embed_dim else model
        self.check(fitting)
        return fitting.first_dimensions(self.dim)

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

    @cached_property
    def fields(self) -> list[str]:
        """Names of the stored fields of the samples, beside key, caption and shard."""
        return sorted(
            {name for part in self.record.parts for name in stored.field_names(stored.table(self.folder, part))}
        )

    def conditions(self, where: Sequence[str]) -> list[Condition]:
        """Conditions from texts such as `style=noto`, see `Condition`.

        Raises:
            UserError: a condition cannot be read, or names a field that is not stored.
        """
        found, known = [Condition.parse(text) for text in where], [*TEXTS, *self.fields]
        for condition in found:
            if condition.field not in known:
                raise UserError(f"--where: the index has no field {condition.field!r}; it has {', '.join(known)}")
        return found

    def select(self, where: Sequence[str]) -> Rows:
        """Numbers of the rows that meet all conditions, ascending.

        Raises:
            UserError: as for `conditions`.
        """
        return self._selection(tuple(where))

    def _select(self, where: tuple[str, ...]) -> Rows:
        conditions, found = self.conditions(where), []
        for number, start in enumerate(self._starts[:-1].tolist()):
            meets = np.ones(len(self.parts[number]), dtype=bool)
            for condition in conditions:
                meets &= self._meets(number, condition)
            found.append(start + np.flatnonzero(meets))
        return np.concatenate(found)

    def _meets(self, number: int, condition: Condition) -> npt.NDArray[np.bool_] | bool:
        """The rows of a part that meet a condition, or whether all do."""
        if condition.field == "shard":
            return condition.accepts(self.shards[number]) != (condition.operator == "!=")
        columns = self._columns(number, [condition.field])
        if condition.field not in columns.column_names:
            return condition.operator == "!="
        return condition.rows(columns.column(condition.field))

    def _columns(self, number: int, names: Sequence[str] | None) -> Any:
        """Columns of the table of a part; None: all."""
        return stored.read_table(stored.table(self.folder, self.record.parts[number]), len(self.parts[number]), names)

    def nearest(
        self, queries: Embeddings, k: int = 10, exact: bool | None = None, where: Sequence[str] = ()
    ) -> Matches:
        """Row numbers and cosines of the k nearest images to each query [Q, D].

        Args:
            exact: compare with every embedding. Default: True if the index has no graph.
            where: conditions on the images, see `select`. Those that meet them are compared exactly.

        Raises:
            UserError: the graph is requested but missing, usearch is not installed, or a condition cannot be used.
        """
        path = self.folder / GRAPH
        if where:
            rows = self.select(where)
            found, similarities = exact_nearest(queries, chosen_rows(self.parts, rows), k, unit=True)
            return rows[found], similarities
        # A graph is one of all dimensions.
        if exact or (exact is None and not path.is_file()) or self.dim < self.record.dim:
            return exact_nearest(queries, self.parts, k, unit=True)
        if not path.is_file():
            raise UserError(f"{self.folder} has no graph; make it: mmssl embed ... --graph")
        return self._graph.nearest(queries, min(k, len(self)))

    def distinct(
        self, query: Embeddings, k: int, limit: float, exact: bool | None = None, where: Sequence[str] = ()
    ) -> Matches:
        """As `nearest` for one query [1, D], without images that are nearly the same as a nearer one.

        Of images whose cosine with each other is above `limit`, the nearest to the query stays. There are fewer than k
        if the index has no more.

        Raises:
            UserError: as for `nearest`.
        """
        wanted, count = k, len(self)
        while True:
            wanted = min(max(2 * wanted, 32), count)
            rows, similarities = self.nearest(query, wanted, exact, where)
            kept = self._distinct(rows[0], k, limit)
            if len(kept) == k or wanted == count or rows.shape[1] < wanted:
                return rows[:, kept], similarities[:, kept]

    def _distinct(self, rows: npt.NDArray[np.int64], k: int, limit: float) -> list[int]:
        """Places of the first k rows that are not too similar to an earlier one of them."""
        kept: list[int] = []
        chosen = np.empty((k, self.dim), dtype=np.float32)
        for place, row in enumerate(rows.tolist()):
            embedding = self.embedding(row)
            if len(kept) == 0 or float((chosen[: len(kept)] @ embedding).max()) <= limit:
                chosen[len(kept)] = embedding
                kept.append(place)
                if len(kept) == k:
                    break
        return kept

    def tables(self) -> Iterator[tuple[str, Any, Embeddings]]:
        """The shard, the table (key, caption, fields) and the embeddings [n, D] of each part."""
        for number, shard in enumerate(self.shards):
            yield shard, self._table(number), self.parts[number]

    def hits(self, rows: Sequence[int], similarities: Sequence[float]) -> list[Hit]:
        """Shard, key, caption and fields of rows, with the given similarities."""
        found = []
        numbers, places = locate(self._starts, np.asarray(rows, dtype=np.int64))
        for number, place, similarity in zip(numbers.tolist(), places.tolist(), similarities, strict=True):
            entry = self._table(number).slice(place, 1).to_pylist()[0]
            fields = {n: v[0] if len(v) == 1 else v for n, v in entry.items() if v and n not in ("key", "caption")}
            found.append(Hit(float(similarity), self.shards[number], entry["key"], entry["caption"], fields))
        return found

    def embedding(self, row: int) -> npt.NDArray[np.float32]:
        """The stored embedding of an image, [D]."""
        number, place = locate(self._starts, np.asarray(row))
        return stored.as_unit(self.parts[int(number)][int(place)])

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
