"""Files that are neither tables nor shards, under any name: named for what they are, with what to do."""

import io
import json
import pickle
import sqlite3
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from mmssl.data.packing import open_records, pack
from mmssl.data.shards import SampleLimits, index_shards
from mmssl.errors import UserError
from tests.helpers.images import encode


def zipped(*names: str) -> bytes:
    """A zip archive with these members."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    return file.getvalue()


def database(path: Path) -> bytes:
    """A SQLite database."""
    with sqlite3.connect(path) as connection:
        connection.execute("create table pairs (image, caption)")
    connection.close()
    return path.read_bytes()


def array() -> bytes:
    """A `.npy` file."""
    file = io.BytesIO()
    np.save(file, np.zeros(3))
    return file.getvalue()


def arrow_stream() -> bytes:
    """A file of a saved Hugging Face dataset."""
    sink = io.BytesIO()
    batch = pa.record_batch([pa.array([1])], ["a"])
    with pa.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    return sink.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n"
KINDS: dict[str, tuple[str, Callable[[Path], bytes], str]] = {
    "xlsx": ("t.xlsx", lambda _: zipped("[Content_Types].xml", "xl/workbook.xml"), "Excel workbook; save it as CSV"),
    "xlsx of a library": ("t.csv", lambda _: zipped("docProps/app.xml", "xl/a.xml"), "Excel workbook; save it as CSV"),
    "xls": ("t.xls", lambda _: b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), "Excel workbook; save it as CSV"),
    "zip": ("t.zip", lambda _: zipped("a.jpg", "a.txt"), "zip archive; unpack it"),
    "zipped csv": ("t.csv.zip", lambda _: zipped("t.csv"), "zip archive; unpack it"),
    "sqlite": ("t.sqlite", lambda place: database(place / "new"), "SQLite database; export"),
    "npy": ("t.npy", lambda _: array(), "NumPy array"),
    "pickle": (
        "t.pkl",
        lambda _: pickle.dumps({"a": 1}),
        "may run code and is not read; save it as Parquet",
    ),
    "arrow": ("data-0.arrow", lambda _: arrow_stream(), "Arrow stream; give the folder of save_to_disk"),
    "pointer": ("t.parquet", lambda _: LFS, "git lfs pull"),
    "pointer, csv": ("t.csv", lambda _: LFS, "git lfs pull"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_and_the_remedy_are_named(kind: str, tmp_path: Path) -> None:
    """Given as a table or as a shard, the file is refused by its content, and no index is left beside it."""
    name, content, says = KINDS[kind]
    path = tmp_path / name
    path.write_bytes(content(tmp_path))
    with pytest.raises(UserError) as caught:
        open_records(path)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    (tmp_path / "shards").mkdir()
    shard = tmp_path / "shards" / "a.tar"
    shard.write_bytes(path.read_bytes())
    (index,) = index_shards([str(shard)], SampleLimits())
    assert index.samples == 0
    assert says in index.problems[0]
    assert [file.name for file in shard.parent.iterdir()] == ["a.tar"]


@pytest.mark.parametrize("name", ["more.zip", "captions.xlsx", "pairs.sqlite", "part.rar"])
def test_in_a_folder_they_are_counted_as_unknown(name: str, tmp_path: Path) -> None:
    """An archive or a workbook among pairs is named, as nobody can tell what it holds."""
    root = tmp_path / "in"
    root.mkdir()
    (root / "a.png").write_bytes(encode(Image.new("RGB", (8, 8)), "PNG"))
    (root / "a.txt").write_text("a pair")
    (root / name).write_bytes(b"x")
    packed = pack(open_records(root), tmp_path / "out", threads=1)
    assert packed.account.summary() == (
        "1 pair offered = 1 used + 0 left out; besides, an unknown number is lost (a file that may hold pairs is not "
        "opened: 1)"
    )
    assert name in next(packed.account.causes())


def test_a_table_whose_columns_are_unknown_is_named_beside_its_images(tmp_path: Path) -> None:
    """Images without captions beside a table of unusual columns: what is missing in the table is said."""
    root = tmp_path / "in"
    root.mkdir()
    (root / "a.png").write_bytes(encode(Image.new("RGB", (8, 8)), "PNG"))
    (root / "t.csv").write_text("ID,Finding\na,no acute disease\n")
    account = pack(open_records(root), tmp_path / "out", threads=1).account
    assert account.left_out["no caption"].pairs == 1
    told = account.left_out["a file that may hold pairs is not opened"]
    assert "t.csv (it has no image column; its columns are ID, Finding)" in told.example
    assert "--image-column" in told.remedy


ROWS = [{"image": f"{n}.png", "caption": f"caption {n}"} for n in range(3)]
FORMS = {
    "columns": {name: {f"{n}": row[name] for n, row in enumerate(ROWS)} for name in ("image", "caption")},
    "index": {f"{n}": row for n, row in enumerate(ROWS)},
    "split": {"columns": ["image", "caption"], "index": [0, 1, 2], "data": [[*row.values()] for row in ROWS]},
    "list": {name: [row[name] for row in ROWS] for name in ("image", "caption")},
    "table": {"schema": {"fields": []}, "data": ROWS},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_in_which_pandas_writes_json_is_a_table(form: str, tmp_path: Path) -> None:
    """DataFrame.to_json writes columns by default; each orientation gives the rows."""
    (tmp_path / "t.json").write_text(json.dumps(FORMS[form]))
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(encode(Image.new("RGB", (8, 8), (number, 0, 0)), "PNG"))
    records = open_records(tmp_path / "t.json")
    assert [records.load(n)[1]["txt"] for n in range(3)] == [f"caption {n}" for n in range(3)]
    assert len({records.load(n)[0] for n in range(3)}) == len(records.keys()) == 3
