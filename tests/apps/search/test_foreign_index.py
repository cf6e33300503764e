"""Index folders that are damaged or come from elsewhere are used, mended or refused in one line."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from mmssl.apps.search import Hit, Index, ShardImages, read_images
from mmssl.data import USUAL_MEMBERS
from mmssl.errors import UserError
from mmssl.inference.stored import EmbeddingRecord, write_part
from mmssl.rng import generator
from tests.helpers.tars import write_shards

ROWS, DIM = 40, 16
DEEP = "[" * 100_000


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of two shards with a graph."""
    folder = tmp_path_factory.mktemp("index")
    shards = write_shards(folder / "shards", [ROWS, ROWS])
    EmbeddingRecord("a model", DIM, shards, [0, 1], [None, None], USUAL_MEMBERS).write(folder)
    (folder / "parts").mkdir()
    for number, shard in enumerate(shards):
        rows = generator("foreign index", number).normal(size=(ROWS, DIM))
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        keys = [f"{number}-{i}" for i in range(ROWS)]
        columns = {"shard": [shard] * ROWS, "key": keys, "caption": [f"caption {key}" for key in keys]}
        write_part(folder, number, rows.astype(np.float16), columns, {})
    Index(folder).build_graph()
    return folder


@pytest.fixture
def folder(template: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(template, tmp_path / "index"))


def search(folder: Path) -> list[Hit]:
    """The three nearest to a row, by the graph."""
    index = Index(folder)
    rows, similarities = index.nearest(index.embedding(5)[None], 3)
    return index.hits(rows[0].tolist(), similarities[0].tolist())


def test_a_damaged_graph_is_built_again(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever bytes of the graph change, wherever it is cut, the hits are those of the whole one, with a warning; the
    next search takes the graph as it is."""
    expected, whole, rng = search(folder), (folder / "graph.usearch").read_bytes(), generator("mutations")
    assert caplog.text == ""
    for trial in range(60):
        content = bytearray(whole)
        places = rng.integers(0, 200 if trial % 2 else len(content), 1 + trial % 8)
        content[:] = content[: int(rng.integers(len(content)))] if trial % 5 == 0 else content
        for place in places:
            content[place % max(1, len(content)) : place % max(1, len(content)) + 1] = rng.bytes(1)
        if content == whole:
            continue
        (folder / "graph.usearch").write_bytes(content)
        caplog.clear()
        assert search(folder) == expected
        assert "built again" in caplog.text
        caplog.clear()
        assert search(folder) == expected
        assert caplog.text == ""
    (folder / "graph.json").unlink()
    assert search(folder) == expected
    assert "built again" in caplog.text


def _json(**changes: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / "index.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def _text(name: str, content: str | bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def _part(array: np.ndarray) -> Callable[[Path], object]:
    return lambda folder: np.save(folder / "parts" / "000000.npy", array, allow_pickle=True)


def _table(**columns: list[object]) -> Callable[[Path], object]:
    return lambda folder: pyarrow.parquet.write_table(pyarrow.table(columns), folder / "parts" / "000000.parquet")


def _fifo(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


NPY, PARQUET = "parts/000000.npy", "parts/000000.parquet"
TEXTS: list[object] = ["x"] * ROWS
DAMAGE: dict[str, Callable[[Path], object]] = {
    "record: not JSON": _text("index.json", b"\xff\x00{"),
    "record: deep": _text("index.json", DEEP),
    "record: a list": _text("index.json", "[]"),
    "record: a number": _text("index.json", "3"),
    "record: no shards": _json(shards=None),
    "record: shards of numbers": _json(shards=[1, 2]),
    "record: shards a text": _json(shards="ab"),
    "record: no dimensions": _json(dim=0),
    "record: other dimensions": _json(dim=1),
    "record: dimensions as text": _json(dim="16"),
    "record: no model": _json(model=None),
    "record: parts of texts": _json(parts=["0", "../../x"]),
    "record: negative part": _json(parts=[0, -1]),
    "record: states of texts": _json(states=["a", None]),
    "record: members a list": _json(members=[]),
    "record: no shard": _json(shards=[], parts=[], states=[]),
    "record: more shards": _json(shards=["a", "b", "c"]),
    "part: empty": _text(NPY, b""),
    "part: text": _text(NPY, "no array"),
    "part: a zip": _text(NPY, b"PK\x03\x04" + bytes(100)),
    "part: cut": lambda folder: (folder / NPY).write_bytes((folder / NPY).read_bytes()[:300]),
    "part: float64": _part(np.zeros((ROWS, DIM))),
    "part: a row": _part(np.zeros(DIM, dtype=np.float16)),
    "part: other dimensions": _part(np.zeros((ROWS, DIM + 1), dtype=np.float16)),
    "part: other rows": _part(np.zeros((ROWS + 1, DIM), dtype=np.float16)),
    "part: objects": _part(np.array([{}], dtype=object)),
    "part: huge": _text(
        NPY,
        b"\x93NUMPY\x01\x00\x76\x00"
        + b"{'descr': '<f2', 'fortran_order': False, 'shape': (99999999999999, 16), }".ljust(117)
        + b"\n",
    ),
    "part: damaged header": _text(
        NPY, b"\x93NUMPY\x01\x00\x76\x00" + b"{'descr': __import__('os')}".ljust(117) + b"\n"
    ),
    "part: a named pipe": _fifo(NPY),
    "table: empty": _text(PARQUET, b""),
    "table: text": _text(PARQUET, "no table" * 100),
    "table: missing": lambda folder: (folder / PARQUET).unlink(),
    "table: cut": lambda folder: (folder / PARQUET).write_bytes((folder / PARQUET).read_bytes()[:-40]),
    "table: other columns": _table(other=TEXTS),
    "table: other rows": _table(key=["x"], caption=["x"]),
    "table: numbers": _table(key=list(range(ROWS)), caption=TEXTS),
    "table: nothing": _table(key=TEXTS, caption=["x"] * (ROWS - 1) + [None]),
    "table: a named pipe": _fifo(PARQUET),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_part_is_one_line(damage: str, folder: Path) -> None:
    """The error names the file, and says what to do, before a search returns anything."""
    DAMAGE[damage](folder)
    with pytest.raises(UserError, match=str(folder)) as error:
        search(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name",
    ["pipe:touch ran; echo", "http://127.0.0.1:9/x.tar", "s3://bucket/x.tar", "memory://x/y.tar", "file:///etc/passwd"],
)
def test_images_are_read_from_local_shards_only(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard that the index names by an address is not fetched unless asked for, and runs nothing at all."""
    monkeypatch.chdir(tmp_path)
    _json(shards=[name, name])(folder)
    hits = search(folder)
    monkeypatch.setattr("mmssl.data.storage.sequential.Fetcher.stream", lambda *args: pytest.fail(f"fetches {args}"))
    if "://" in name:
        assert read_images(hits) == [None] * 3
    else:
        with pytest.raises(UserError, match="cannot be read"):
            read_images(hits)
    assert ShardImages(Index(folder)).read(0) is None
    if name.startswith(("memory", "file")):
        with pytest.raises(UserError, match="of addresses, only http"):
            read_images(hits, remote=True)
    assert not (tmp_path / "ran").exists()


def test_a_named_pipe_as_shard_does_not_block(folder: Path, tmp_path: Path) -> None:
    """It is refused by name, or shown as missing."""
    os.mkfifo(tmp_path / "pipe.tar")
    _json(shards=[str(tmp_path / "pipe.tar")] * 2)(folder)
    with pytest.raises(UserError, match="not a regular file"):
        read_images(search(folder))
    assert ShardImages(Index(folder)).read(0) is None
