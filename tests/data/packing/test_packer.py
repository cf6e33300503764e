"""Packing: every record arrives once and unchanged, from any source, after any interruption."""

import csv
import io
import json
import math
import tarfile
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmssl.data import iter_samples
from mmssl.data.health import survey_shards
from mmssl.data.packing.packer import BAD, Encoding, pack
from mmssl.data.packing.records import RecordError, Records
from mmssl.data.packing.tables import open_records
from mmssl.data.transforms import DecodeError, EvalView
from mmssl.data.transforms.decoding import MAX_PIXELS
from mmssl.errors import UserError
from mmssl.types import Sample
from tests.helpers.images import encode, orientation, photo, png_of
from tests.helpers.tars import tar_bytes

CAPTIONS = [f"caption {i}, with “quotes”" for i in range(12)]


def image(number: int, format: str = "PNG") -> bytes:
    """A small image unlike the others."""
    return encode(Image.new("RGB", (12, 10), (number * 20, 99, 255 - number * 20)), format)


def folder(root: Path) -> Path:
    """Images in folders, captions beside them."""
    for i, caption in enumerate(CAPTIONS):
        path = root / f"part{i % 3}" / f"pic.{i:02}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Path(f"{path}.{('png', 'JPG', 'webp')[i % 3]}").write_bytes(image(i, ("PNG", "JPEG", "WEBP")[i % 3]))
        if i % 2:
            Path(f"{path}.txt").write_text(caption, encoding="utf-8")
        else:
            Path(f"{path}.json").write_text(json.dumps({"caption": caption, "n": i}))
    return root


def rows(root: Path) -> list[dict[str, Any]]:
    """Rows of a table whose images lie beside it."""
    (root / "img").mkdir(parents=True)
    for i in range(len(CAPTIONS)):
        (root / "img" / f"{i}.png").write_bytes(image(i))
    return [{"file_name": f"img/{i}.png", "caption": caption, "n": i} for i, caption in enumerate(CAPTIONS)]


def table(root: Path, suffix: str) -> Path:
    """The rows as a CSV, TSV, JSONL or Parquet file."""
    content, path = rows(root), root / f"table{suffix}"
    if suffix in (".csv", ".tsv"):
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, list(content[0]), delimiter="\t" if suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(content)
    elif suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in content) + "\n\n")
    else:
        pq.write_table(pa.Table.from_pylist(content), path, row_group_size=5)
    return path


def hugging_face(root: Path) -> Path:
    """A folder as `datasets` writes it with save_to_disk: Arrow streams and a state.json."""
    root.mkdir()
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for part in range(2):
        numbers = range(part * 6, part * 6 + 6)
        columns = {
            "image": pa.array([{"bytes": image(i), "path": None} for i in numbers], kind),
            "caption": pa.array([[CAPTIONS[i], "another"] for i in numbers]),
            "n": pa.array(list(numbers)),
        }
        batch = pa.table(columns)
        with pa.ipc.new_stream(str(root / f"data-{part:05}-of-00002.arrow"), batch.schema) as writer:
            writer.write_table(batch)
    names = [{"filename": f"data-{part:05}-of-00002.arrow"} for part in range(2)]
    (root / "state.json").write_text(json.dumps({"_data_files": names}))
    return root


def source(kind: str, root: Path) -> Path:
    """A source of the twelve pairs."""
    if kind == "folder":
        return folder(root)
    return hugging_face(root) if kind == "hugging face" else table(root, kind)


def read(paths: list[Path]) -> list[Sample]:
    """All samples of shards."""
    return list(iter_samples([str(path) for path in paths]))


@pytest.mark.parametrize("kind", ["folder", ".csv", ".tsv", ".jsonl", ".parquet", "hugging face"])
def test_every_source_arrives(kind: str, tmp_path: Path) -> None:
    """From every kind of source each pair arrives once: the image's bytes unchanged, caption and fields beside."""
    packed = pack(open_records(source(kind, tmp_path / "in")), tmp_path / "out", shard_samples=5)
    samples = read(packed.shards["train"])
    assert [path.name for path in packed.shards["train"]] == ["train-00000.tar", "train-00001.tar", "train-00002.tar"]
    assert packed.samples == len(samples) == 12
    assert packed.bad == []
    by_caption = {sample.fields["txt"]: sample for sample in samples}
    for i, caption in enumerate(CAPTIONS):
        format = ("PNG", "JPEG", "WEBP")[i % 3] if kind == "folder" else "PNG"
        assert by_caption[caption].image == image(i, format)
        if kind != "folder" or i % 2 == 0:
            assert int(by_caption[caption].fields["n"]) == i
    keys = {sample.key for sample in samples}
    assert keys == (
        {f"part{i % 3}/pic_{i:02}" for i in range(12)} if kind == "folder" else {f"{i:09}" for i in range(12)}
    )
    if kind == "hugging face":
        assert by_caption[CAPTIONS[3]].fields["caption"] == [CAPTIONS[3], "another"]


def test_columns_can_be_named(tmp_path: Path) -> None:
    """Columns of any name serve when named; the others and the image's path go into the JSON; a missing one is
    explained."""
    for row in (content := rows(tmp_path)):
        row |= {"photo": row.pop("file_name"), "words": row.pop("caption"), "code": f"k.{row['n']}"}
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in content))
    with pytest.raises(UserError, match=r"no image column .*its columns are n, photo, words, code"):
        open_records(path)
    with pytest.raises(UserError, match=r"no caption column \('text'\)"):
        open_records(path, "photo", "text")
    packed = pack(open_records(path, "photo", "words", "code"), tmp_path / "out")
    samples = {sample.key: sample.fields for sample in read(packed.shards["train"])}
    assert samples["k_3"] == {"txt": CAPTIONS[3], "n": 3, "photo": content[3]["photo"], "code": "k.3"}


class Plain(Records):
    """Records in memory, some of which cannot be read, counting how often each is loaded."""

    def __init__(self, count: int, broken: tuple[int, ...] = ()) -> None:
        self.names = [f"r{i:04}" for i in range(count)]
        self.broken = broken
        self.loads: Counter[int] = Counter()

    def keys(self) -> list[str]:
        return self.names

    def load(self, number: int) -> tuple[tuple[bytes, ...], dict[str, Any]]:
        self.loads[number] += 1
        if number in self.broken:
            raise RecordError("it is missing")
        return (image(number % 12),), {"txt": f"text {number}"}


def test_splits_by_hash(tmp_path: Path) -> None:
    """Splits have their fractions, every record is in exactly one, and adding records moves none to another split."""
    shares = {"train": 0.8, "val": 0.15, "test": 0.05}
    small = pack(Plain(300), tmp_path / "a", splits=shares, shard_samples=100)
    large = pack(Plain(600), tmp_path / "b", splits=shares, shard_samples=100)
    keys = {name: {s.key for s in read(paths)} for name, paths in large.shards.items()}
    assert {name: len(found) / 600 for name, found in keys.items()} == pytest.approx(shares, abs=0.05)
    assert sum(map(len, keys.values())) == len(set.union(*keys.values())) == 600
    for name, paths in small.shards.items():
        assert {s.key for s in read(paths)} <= keys[name]


def test_order_is_mixed(tmp_path: Path) -> None:
    """Neighbours of the source are spread over the shards."""
    packed = pack(Plain(400), tmp_path, shard_samples=100)
    numbers = np.array([int(s.key[1:]) for s in read(packed.shards["train"])])
    assert abs(np.corrcoef(np.arange(400), numbers)[0, 1]) < 0.2


def test_shards_are_the_same_each_time(tmp_path: Path) -> None:
    """Packing is deterministic to the byte, at any number of threads."""
    for name, threads in (("a", 1), ("b", 4)):
        pack(Plain(50), tmp_path / name, shard_samples=10, threads=threads)
    for path in sorted((tmp_path / "a").glob("*.tar")):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


class InterruptedRunError(Exception):
    """Stands for a killed process."""


def test_the_first_error_stops_all_threads(tmp_path: Path) -> None:
    """An error in one thread stops the others and is the one that is raised."""

    def interrupt(done: int, total: int) -> None:
        if done == 30:
            raise InterruptedRunError

    records = Plain(2000)
    with pytest.raises(InterruptedRunError):
        pack(records, tmp_path, shard_samples=100, threads=4, progress=interrupt)
    assert len(records.loads) < 100


@pytest.mark.parametrize("after", [1, 17, 49])
def test_resume_writes_what_is_missing(after: int, tmp_path: Path) -> None:
    """After an interruption only the shards that are missing are written, and the result is that of one run."""
    whole = pack(Plain(50, broken=(3, 30)), tmp_path / "whole", shard_samples=10, threads=1)

    def interrupt(done: int, total: int) -> None:
        if done == after:
            raise InterruptedRunError

    with pytest.raises(InterruptedRunError):
        pack(Plain(50, broken=(3, 30)), tmp_path / "out", shard_samples=10, threads=1, progress=interrupt)
    standing = {path.name for path in (tmp_path / "out").glob("*.tar")}
    assert len(standing) == after // 10
    records = Plain(50, broken=(3, 30))
    again = pack(records, tmp_path / "out", shard_samples=10)
    assert again.kept == len(standing)
    assert len(records.loads) == 50 - 10 * len(standing)
    for path in whole.shards["train"]:
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    lines = [json.loads(line) for line in (tmp_path / "out" / BAD).read_text().splitlines()]
    assert sorted(line["key"] for line in lines) == ["r0003", "r0030"]
    assert again.account == whole.account
    assert (again.account.offered, again.account.used) == (50, 48)
    assert {cause: omission.pairs for cause, omission in again.account.left_out.items()} == {"it is missing": 2}
    assert not list((tmp_path / "out").glob("*.partial"))


def test_other_packings_are_not_mixed(tmp_path: Path) -> None:
    """A folder with shards of other records, other options or unknown origin is refused."""
    pack(Plain(20), tmp_path / "out")
    for records, options in (
        (Plain(21), {}),
        (Plain(20), {"shard_samples": 5}),
        (Plain(20), {"encoding": Encoding(8)}),
    ):
        with pytest.raises(UserError, match="choose another folder"):
            pack(records, tmp_path / "out", **options)  # type: ignore[arg-type]
    table = tmp_path / "t.jsonl"
    for caption in ("x", "x", "another"):
        table.write_text(json.dumps({"image": "a.png", "caption": caption}))
        (tmp_path / "a.png").write_bytes(image(0))
        if caption == "x":
            pack(open_records(table), tmp_path / "one")
        else:  # of as many rows, which are named by their numbers
            with pytest.raises(UserError, match="choose another folder"):
                pack(open_records(table), tmp_path / "one")
    for shares in ({"train": math.inf}, {"train": math.nan}, {"train": 1.0, "val": -0.5}, {"train": 0.0}):
        with pytest.raises(UserError, match="must be positive numbers"):
            pack(Plain(20), tmp_path / "shares", splits=shares)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "x.tar").write_bytes(b"")
    with pytest.raises(UserError, match="choose another folder"):
        pack(Plain(20), tmp_path / "foreign")


def test_bad_records_are_named(tmp_path: Path) -> None:
    """Records without image or caption, with a broken image, or with a repeated key are left out and named."""
    root = folder(tmp_path / "in")
    (root / "a.png").write_bytes(image(0)[:40])
    (root / "a.txt").write_text("cut")
    (root / "b.png").write_bytes(image(0))
    (root / "c.png").write_bytes(image(0))
    (root / "c.txt").write_text(" \n")
    (root / "d.png").write_bytes(image(0))
    (root / "d.json").write_text("{")
    (root / "e.png").write_bytes(image(1))
    (root / "e.jpg").write_bytes(image(2, "JPEG"))
    (root / "e.txt").write_text("twice")
    (root / "f.png").write_bytes(image(0))
    (root / "f.txt").write_bytes(b"\xff\xfe\xfa")
    packed = pack(open_records(root), tmp_path / "out")
    reasons = dict(packed.bad)
    assert set(reasons) == set("abcdef")
    for key, words in {
        "a": "broken or cut",
        "b": "no caption",
        "c": "empty",
        "d": "damaged",
        "e": "before",
        "f": "UTF-8",
    }.items():
        assert words in reasons[key]
    assert packed.samples == packed.account.used == 13
    assert packed.account.omitted == 6
    assert len(packed.account.left_out) == 6
    assert {s.key for s in read(packed.shards["train"])} >= {"e"}


def test_rows_without_images_are_named(tmp_path: Path) -> None:
    """A row without an image file is left out with the reason."""
    content = [
        *rows(tmp_path),
        {"file_name": "img/none.png", "caption": "x"},
        {"file_name": "", "caption": "x"},
        {"file_name": "img/1.png", "caption": None},
        {"file_name": "img/\0.png", "caption": "x"},
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(row) for row in content))
    packed = pack(open_records(tmp_path / "t.jsonl"), tmp_path / "out")
    assert {key: reason.split(" ")[-1] for key, reason in packed.bad} == {
        "000000012": "directory",
        "000000015": "byte",
        "000000013": "bytes",
        "000000014": "text",
    }


@pytest.mark.parametrize(
    ("given", "wanted", "resize", "extension"),
    [
        ("JPEG", "keep", 64, "jpg"),
        ("WEBP", "keep", 64, "webp"),
        ("PNG", "keep", 64, "png"),
        ("BMP", "keep", 64, "png"),
        ("PNG", "jpeg", None, "jpg"),
        ("JPEG", "webp", 64, "webp"),
        ("GIF", "keep", None, "gif"),
    ],
)
def test_resizing_and_reencoding(given: str, wanted: str, resize: int | None, extension: str, tmp_path: Path) -> None:
    """Images are shrunk to the shorter side and written upright in the requested format."""
    root = tmp_path / "in"
    root.mkdir()
    options = {"exif": orientation(6)} if given == "JPEG" else {}
    (root / f"a.{given.lower()}").write_bytes(encode(photo(200, 300), given, **options))
    (root / "a.txt").write_text("x")
    packed = pack(open_records(root), tmp_path / "out", encoding=Encoding(resize, wanted))  # type: ignore[arg-type]
    with tarfile.open(packed.shards["train"][0]) as tar:
        names = tar.getnames()
        content = tar.extractfile(names[0]).read()  # type: ignore[union-attr]
    assert names == [f"a.{extension}", "a.txt"]
    with Image.open(io.BytesIO(content)) as result:
        size = (300, 200) if resize is None else (96, 64)
        assert result.size == (size[::-1] if given == "JPEG" else size)
        assert result.getexif().get(0x0112) is None


def test_a_image_too_large_for_its_format_is_left_out(tmp_path: Path) -> None:
    """WebP is limited to 16,383 pixels per side: one panorama does not stop the packing."""
    (tmp_path / "in").mkdir()
    for name, width in (("wide", 16_384), ("small", 16)):
        (tmp_path / "in" / f"{name}.png").write_bytes(encode(Image.new("RGB", (width, 4)), "PNG"))
        (tmp_path / "in" / f"{name}.txt").write_text(name)
    packed = pack(open_records(tmp_path / "in"), tmp_path / "out", encoding=Encoding(format="webp"))
    assert [s.key for s in read(packed.shards["train"])] == ["small"]
    ((key, reason),) = packed.bad
    assert key == "wide"
    assert "cannot be written as WEBP" in reason


def test_the_cap_on_pixels_is_that_of_every_verb_and_can_be_raised(tmp_path: Path) -> None:
    """One pixel beyond it, an image is left out of shards with the option to use it, and `check` and a model refuse it
    too; with another cap it is packed."""
    side = 1 + math.isqrt(MAX_PIXELS)
    (tmp_path / "a").mkdir()
    for name, content in (("huge", png_of(side, side)), ("small", image(1))):
        (tmp_path / "a" / f"{name}.png").write_bytes(content)
        (tmp_path / "a" / f"{name}.txt").write_text("a caption")
    packed = pack(open_records(tmp_path / "a"), tmp_path / "b")
    assert packed.account.used == 1
    assert f"{side} x {side} pixels" in packed.account.text()
    assert "--max-pixels" in packed.account.text()
    (tmp_path / "c.tar").write_bytes(tar_bytes([("k.png", png_of(side, side)), ("k.txt", b"a caption")]))
    assert "data.max_pixels" in survey_shards([str(tmp_path / "c.tar")]).bad[0].error
    with pytest.raises(DecodeError, match=r"data\.max_pixels"):
        EvalView(16)(png_of(side, side))
    for cap, used in ((119, 0), (120, 1)):
        out = tmp_path / f"cap{cap}"
        assert pack(open_records(tmp_path / "a"), out, encoding=Encoding(max_pixels=cap)).account.used == used


def test_row_groups_are_read_once_however_many_threads_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads that read different row groups do not evict each other's."""
    rows = [{"image": image(i % 12), "caption": f"caption {i}"} for i in range(160)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet", row_group_size=10)
    whole, groups = pq.ParquetFile.read_row_group, Counter[int]()

    def read_row_group(self: pq.ParquetFile, number: int) -> pa.Table:
        groups[number] += 1
        return whole(self, number)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", read_row_group)
    records, together = open_records(tmp_path / "t.parquet"), threading.Barrier(8)

    def load(thread: int) -> None:
        for number in range(20 * thread, 20 * thread + 20):
            together.wait(30)
            assert records.load(number)[1]["txt"] == f"caption {number}"

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(load, range(8)))
    assert groups == Counter(range(16))


def test_small_images_are_not_touched(tmp_path: Path) -> None:
    """An image that is small enough keeps its bytes; a larger one in the same packing does not."""
    root = tmp_path / "in"
    root.mkdir()
    small, large = encode(photo(64, 200), "JPEG"), encode(photo(65, 200), "JPEG")
    for name, content in (("small", small), ("large", large)):
        (root / f"{name}.jpg").write_bytes(content)
        (root / f"{name}.txt").write_text(name)
    packed = pack(open_records(root), tmp_path / "out", encoding=Encoding(resize=64))
    found = {s.key: s.image for s in read(packed.shards["train"])}
    assert found["small"] == small
    assert found["large"] != large


def test_unusable_sources_are_explained(tmp_path: Path) -> None:
    """Missing, empty, foreign and damaged sources end in one line that says what to give."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.txt").write_text("x")
    (tmp_path / "bad.jsonl").write_text("{]")
    (tmp_path / "none.csv").write_text("image,caption\n")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    (tmp_path / "arrow").mkdir()
    (tmp_path / "arrow" / "state.json").write_text('{"_data_files": [{"filename": "none.arrow"}]}')
    (tmp_path / "several").mkdir()
    (tmp_path / "several" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for name, words in {
        "absent": "does not exist",
        "empty": "contains no images",
        "x.txt": "is not a",
        "bad.jsonl": "cannot be read",
        "none.csv": "no rows",
        "bad.parquet": "cannot be read",
        "arrow": "not a complete dataset",
        "several": r"several splits; name one: .*train, .*test",
    }.items():
        with pytest.raises(UserError, match=words) as caught:
            open_records(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_nothing_leaves_the_folder(tmp_path: Path) -> None:
    """Keys cannot escape the archive."""
    content = rows(tmp_path)
    content[0]["id"], content[1]["id"] = "../../etc/passwd", "/abs/olute"
    (tmp_path / "t.jsonl").write_text(
        "\n".join(json.dumps(row | {"id": row.get("id", f"i{row['n']}")}) for row in content)
    )
    packed = pack(open_records(tmp_path / "t.jsonl"), tmp_path / "out")
    with tarfile.open(packed.shards["train"][0]) as tar:
        names = tar.getnames()
    assert not any(name.startswith("/") or ".." in name.split("/") for name in names)
    assert len(read(packed.shards["train"])) == 12


def test_index_is_written(tmp_path: Path) -> None:
    """The shards come with their index, and progress reaches the number of records."""
    seen: list[tuple[int, int]] = []
    packed = pack(Plain(25), tmp_path, shard_samples=10, progress=lambda *counts: seen.append(counts))
    assert all(Path(f"{path}.idx").is_file() for path in packed.shards["train"])
    assert seen == [(i + 1, 25) for i in range(25)]


def test_a_file_that_the_index_would_refuse_is_left_out(tmp_path: Path) -> None:
    """A sample with more bytes than one may have is counted and listed, not packed and lost to the index."""

    class Large(Plain):
        def load(self, number: int) -> tuple[tuple[bytes, ...], dict[str, Any]]:
            images, fields = super().load(number)
            return images, fields | {"note": "x" * (64 << 20) if number == 1 else "y"}

    account = pack(Large(3), tmp_path).account
    assert account.summary() == "3 pairs offered = 2 used + 1 left out (a file has more bytes than a sample may: 1)"
    assert "--resize" in next(account.causes())
