"""Hits without copies, and the table for other stores."""

from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from mmssl.apps.search import Index, embed_shards, write_parquet
from mmssl.errors import UserError
from tests.cli.test_main import main_ok
from tests.helpers.export_models import own
from tests.helpers.toy_encoder import pack, paint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of 90 images in two shards: 30 different ones, three times each."""
    home = tmp_path_factory.mktemp("copies")
    records = [{"png": paint(257 * (n % 30) * 7), "txt": f"größe {n}"} for n in range(90)]
    own().save(home / "model")
    names = [str(pack(home / f"{part}.tar", records[start : start + 45])) for part, start in ((0, 0), (1, 45))]
    embed_shards(own(), names, home / "index")
    return home


@pytest.mark.parametrize("limit", [0.9, 0.999, 1.0])
@pytest.mark.parametrize("k", [1, 10, 40, 200])
def test_copies_of_a_better_hit_are_left_out(folder: Path, limit: float, k: int) -> None:
    """The hits are those of a loop over all images in the order of their similarity, which keeps one if its cosine with
    each that is kept is at most the limit."""
    index = Index(folder / "index")
    query = own().encode_text("a red square").numpy()
    rows, similarities = index.distinct(query, k, limit)
    order, products = index.nearest(query, len(index))
    vectors = {row: index.embedding(row) for row in range(len(index))}
    kept: list[int] = []
    for row in order[0].tolist():
        if all(float(vectors[row] @ vectors[other]) <= limit for other in kept) and len(kept) < k:
            kept.append(row)
    assert [row % 30 for row in rows[0].tolist()] == [row % 30 for row in kept]  # equal copies come in any order
    by_row = dict(zip(order[0].tolist(), products[0].tolist(), strict=True))
    np.testing.assert_allclose(similarities[0], [by_row[row] for row in rows[0].tolist()], atol=1e-6)


def test_the_table_holds_what_the_index_holds(folder: Path, tmp_path: Path) -> None:
    """`--parquet` writes every row of the index in its order: shard, key, caption, and the embedding as float32; a
    place that cannot be written is an error."""
    command = ["embed", str(folder / "model"), str(folder / "*.tar"), "--out", str(tmp_path / "i")]
    main_ok([*command, "--precision", "fp32", "--parquet", str(tmp_path / "v.parquet")])
    index = Index(tmp_path / "i")
    table = pyarrow.parquet.read_table(tmp_path / "v.parquet")
    assert table.column_names == ["shard", "key", "caption", "embedding"]
    hits = index.hits(list(range(90)), [0.0] * 90)
    found = table.select(["shard", "key", "caption"]).to_pylist()
    assert found == [{"shard": hit.shard, "key": hit.key, "caption": hit.caption} for hit in hits]
    expected = np.stack([index.embedding(row) for row in range(90)])
    np.testing.assert_array_equal(np.array(table["embedding"].to_pylist(), np.float32), expected)
    with pytest.raises(UserError, match="cannot be written"):
        write_parquet(index, tmp_path / "none" / "v.parquet")
