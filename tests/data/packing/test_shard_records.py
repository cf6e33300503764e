"""Shards packed again: samples are joined whose members lie apart, unusable ones are left out and counted."""

import random
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from mmssl.data import iter_samples
from mmssl.data.packing import ShardRecords, open_records, pack
from mmssl.data.packing.packer import Packed
from mmssl.data.shards import SampleLimits, index_shards
from mmssl.data.sources import account_of_indexes
from mmssl.errors import UserError
from tests.helpers.images import encode
from tests.helpers.tars import File, tar_bytes


def image(number: int) -> bytes:
    """A small image unlike the others."""
    return encode(Image.new("RGB", (16, 12), (number % 256, number // 256, 9)), "PNG")


def files_of(keys: list[str]) -> list[File]:
    """Pairs whose captions tell the number of their images."""
    return [f for n, key in enumerate(keys) for f in ((f"{key}.png", image(n)), (f"{key}.txt", f"{n}".encode()))]


def write(path: Path, files: list[File]) -> str:
    """A shard with these files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(files, tarfile.GNU_FORMAT))
    return str(path)


def check(packed: Packed, numbers: list[int]) -> None:
    """The packed samples are those of these numbers, each image with its own caption, and train as they are."""
    shards = [str(path) for path in packed.shards["train"]]
    found = {sample.image: sample.fields["txt"] for sample in iter_samples(shards)}
    assert found == {image(n): f"{n}" for n in numbers}
    assert all(not index.left_out and not index.problems for index in index_shards(shards, SampleLimits()))


@pytest.mark.parametrize("order", ["as is", "images first", "shuffled", "two folders", "two folders shuffled"])
@pytest.mark.parametrize("key", ["{:03}", "photo_{}.v1.0", "2024.{:02}", "deep/er.dir/{}"])
def test_members_anywhere_are_joined(tmp_path: Path, key: str, order: str) -> None:
    """Wherever the members of a sample lie in the tar, and however many dots its name has, it is one sample."""
    files = files_of([key.format(n) for n in range(12)])
    if order == "images first":
        files = files[::2] + files[1::2]
    if "two folders" in order:
        files = [(f"{'images' if name.endswith('png') else 'texts'}/{name}", content) for name, content in files]
    if "shuffled" in order:
        random.Random(1).shuffle(files)
    packed = pack(open_records(Path(write(tmp_path / "x.tar", files))), tmp_path / "out", threads=1)
    assert packed.account.summary() == "12 pairs offered = 12 used + 0 left out"
    check(packed, list(range(12)))


def test_fields_and_labels_arrive(tmp_path: Path) -> None:
    """JSON fields and labels are kept; a caption in JSON is one; other members stay out."""
    files = [("a.png", image(0)), ("a.json", b'{"caption": "0", "n": 5}'), ("a.cls", b"3"), ("a.npy", b"array")]
    packed = pack(ShardRecords([write(tmp_path / "x.tar", files)]), tmp_path / "out")
    (sample,) = iter_samples([str(path) for path in packed.shards["train"]])
    assert sample.fields == {"caption": "0", "n": 5, "cls": 3, "txt": "0"}


def test_keys_that_repeat_are_all_packed(tmp_path: Path) -> None:
    """One key in several shards, or twice in one, loses no sample."""
    files = files_of(["a", "b", "a", "b", "a"])
    shards = [write(tmp_path / "0.tar", files[:4]), write(tmp_path / "1.tar", files[4:])]
    packed = pack(ShardRecords(shards), tmp_path / "out")
    check(packed, list(range(5)))
    keys = [sample.key for sample in iter_samples([str(path) for path in packed.shards["train"]])]
    assert len(set(keys)) == 5


def test_unusable_samples_are_left_out_by_cause(tmp_path: Path) -> None:
    """Empty captions, broken images and missing parts are counted with their remedies; the rest trains as it is."""
    files = files_of([f"{n}" for n in range(10)])
    files += [("e0.png", image(50)), ("e0.txt", b""), ("e1.png", image(51)), ("e1.txt", b" \n")]
    files += [("b.png", image(52)[:30]), ("b.txt", b"x"), ("n.png", image(53)), ("t.txt", b"x")]
    packed = pack(open_records(Path(write(tmp_path / "x.tar", files))), tmp_path / "out")
    check(packed, list(range(10)))
    assert packed.account.offered == 15
    assert packed.account.left_out["the caption is empty"].pairs == 2
    assert {"no text", "no image", "the image is broken or cut"} <= set(packed.account.left_out)


def test_archives_and_tables_within_a_tar_are_named(tmp_path: Path) -> None:
    """Tars, zips and tables in a tar are not read: each is counted, with what to do; other files are no matter."""
    inner = tar_bytes(files_of(["a"]))
    others: list[File] = [("x.tar", inner), ("y.zip", b"PK"), ("captions.csv", b"a,b"), ("README.md", b"x")]
    shard = write(tmp_path / "x.tar", [*files_of(["good"]), *others])
    packed = pack(ShardRecords([shard]), tmp_path / "out")
    indexed = account_of_indexes(index_shards([shard], SampleLimits()))
    for account in (packed.account, indexed):
        assert (account.used, account.omitted) == (1, 3)
        assert set(account.left_out) == {f"a .{kind} file within a tar is not read" for kind in ("tar", "zip", "csv")}
        assert all("pack the folder" in omission.remedy for omission in account.left_out.values())


def test_a_shard_under_two_names_counts_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A link to a shard beside it is the same shard, which is said."""
    write(tmp_path / "in" / "0.tar", files_of(["a", "b"]))
    (tmp_path / "in" / "1.tar").symlink_to("0.tar")
    packed = pack(open_records(tmp_path / "in"), tmp_path / "out")
    assert packed.account.summary() == "2 pairs offered = 2 used + 0 left out"
    assert "1.tar is another name of" in caplog.text


def test_damage_and_foreign_files_are_counted(tmp_path: Path) -> None:
    """A hole of zeros and a compressed tar are named among what is left out."""
    content = Path(write(tmp_path / "in" / "0.tar", files_of([f"{n}" for n in range(40)]))).read_bytes()
    half = len(content) // 2 // 512 * 512 + 100
    (tmp_path / "in" / "0.tar").write_bytes(content[:half] + bytes(len(content) - half))
    (tmp_path / "in" / "1.tar").write_bytes(b"\x1f\x8b" + bytes(600))
    packed = pack(open_records(tmp_path / "in"), tmp_path / "out")
    check(packed, list(range(packed.account.used)))
    assert 0 < packed.account.used < 25
    damage = packed.account.left_out["a shard is damaged"]
    assert damage.pairs == 2
    with pytest.raises(UserError, match="cannot be read"):
        ShardRecords([str(tmp_path / "gone.tar")])


@pytest.mark.parametrize(
    ("names", "cause"),
    [
        (["a/image.png", "a/caption.txt"], "the names of its image and its text differ"),
        (["cafe\u0301.png", "caf\xe9.txt"], "the names of its image and its text differ"),
        (["Photo.png", "photo.txt"], "the names of its image and its text differ"),
        (["img/A.png", "txt/a.txt"], "the names of its image and its text differ"),
        (["img/a.png", "txt/a.txt"], "its image and its text lie in different folders"),
    ],
)
def test_other_spellings_are_joined(tmp_path: Path, names: list[str], cause: str) -> None:
    """An image and a text whose names differ are one sample that the index leaves out, once, and that packing joins."""
    shard = write(tmp_path / "x.tar", [*files_of(["good"]), (names[0], image(1)), (names[1], b"1")])
    account = account_of_indexes(index_shards([shard], SampleLimits()))
    assert account.summary() == f"2 pairs offered = 1 used + 1 left out ({cause}: 1)"
    assert "mmssl shards pack" in account.left_out[cause].remedy
    packed = pack(ShardRecords([shard]), tmp_path / "out")
    assert packed.account.summary() == "2 pairs offered = 2 used + 0 left out"
    check(packed, [0, 1])
