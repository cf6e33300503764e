"""An index as one file for other programs: a Parquet table, or an index of FAISS."""

from pathlib import Path
from typing import Any

import numpy as np

from mmssl.apps.search.index import Index
from mmssl.apps.search.nearest import exact_nearest
from mmssl.errors import UserError
from mmssl.files import atomic_write
from mmssl.inference import stored

BLOCK = 1 << 16
"""Rows that are copied at once."""
TRIED, NEIGHBOURS, TOLERANCE = 16, 10, 1e-4
"""Stored rows that a written FAISS index is asked for, the neighbours of each, and the largest accepted difference of
their cosines: both sides sum float32 products, in different orders."""


def write_parquet(index: Index, path: Path) -> None:
    """Write one table: shard, key, caption, the fields, and the embedding as a list of float32, a row for each image.

    A field is a text, or empty; if an image has several values of it, it is a list of texts.

    Raises:
        UserError: a part is damaged, or the file cannot be written.
    """
    import pyarrow
    import pyarrow.parquet

    several = _with_several(index)
    text = pyarrow.string()
    schema = pyarrow.schema(
        [
            *((name, text) for name in ("shard", "key", "caption")),
            *((name, pyarrow.list_(text) if name in several else text) for name in index.fields),
            ("embedding", pyarrow.list_(pyarrow.float32(), index.dim)),
        ]
    )

    def column(table: Any, name: str) -> Any:
        if name not in table.column_names:
            return pyarrow.nulls(len(table), schema.field(name).type)
        if name in index.fields and name not in several:
            return pyarrow.array([values[0] if values else None for values in table.column(name).to_pylist()], text)
        return table.column(name).combine_chunks().cast(schema.field(name).type)

    def write(partial: Path) -> None:
        with pyarrow.parquet.ParquetWriter(partial, schema) as writer:
            for shard, table, embeddings in index.tables():
                flat = pyarrow.array(stored.as_unit(embeddings).ravel())
                columns = [
                    pyarrow.array([shard] * len(table), text),
                    *(column(table, name) for name in ("key", "caption", *index.fields)),
                    pyarrow.FixedSizeListArray.from_arrays(flat, index.dim),
                ]
                writer.write_table(pyarrow.Table.from_arrays(columns, schema=schema))

    try:
        atomic_write(path, write)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}; give another file") from None


def _with_several(index: Index) -> set[str]:
    """Fields of which an image has several values."""
    found = set[str]()
    for _, table, _ in index.tables():
        lists = (name for name in table.column_names if name in index.fields)
        found |= {name for name in lists if any(len(values) > 1 for values in table.column(name).to_pylist())}
    return found


def write_faiss(index: Index, path: Path) -> None:
    """Write a flat index of FAISS with inner products, whose ids are the numbers of the rows, and ask it for some.

    It is exact and holds float32 embeddings, so it takes 4 * D bytes per image in memory too.

    Raises:
        UserError: FAISS is not installed, the file cannot be written, or FAISS finds other images than this package.
    """
    library = _faiss()
    flat = library.IndexIDMap2(library.IndexFlatIP(index.dim))
    start = 0
    for _, _, embeddings in index.tables():
        for first in range(0, len(embeddings), BLOCK):
            block = stored.as_unit(embeddings[first : first + BLOCK])
            flat.add_with_ids(block, np.arange(start, start + len(block)))
            start += len(block)

    def write(partial: Path) -> None:
        library.write_index(flat, str(partial))
        _compare(index, library.read_index(str(partial)))

    try:
        atomic_write(path, write)
    except (OSError, RuntimeError) as error:  # FAISS raises the latter
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[-120:]
        raise UserError(f"{path} cannot be written: {reason}; give another file") from None


def _compare(index: Index, theirs: Any) -> None:
    """Raises UserError if FAISS finds other neighbours of stored rows. Of equal cosines any may come first."""
    if not len(index):
        return
    rows = np.linspace(0, len(index) - 1, min(TRIED, len(index))).astype(np.int64)
    queries = np.stack([index.embedding(row) for row in rows.tolist()])
    k = min(NEIGHBOURS, len(index))
    cosines, found = theirs.search(queries, k)
    expected = exact_nearest(queries, index.parts, k)[1]
    own = np.stack([[index.embedding(row) @ query for row in near] for near, query in zip(found, queries, strict=True)])
    if not max(np.abs(cosines - expected).max(), np.abs(own - expected).max()) <= TOLERANCE:
        raise UserError(f"FAISS finds other neighbours in {index.folder} than this package does; report this index")


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise UserError("an index of FAISS needs faiss-cpu: pip install 'mmssl[faiss]'") from None
    return faiss
