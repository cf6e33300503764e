"""Whole shards as people have them: holes of zeros, files that are no tar, names with dots, members that lie apart."""

import bz2
import gzip
import io
import lzma
import random
import tarfile
from pathlib import Path

import pytest

from mmssl.data import iter_samples
from mmssl.data.health import check_health, survey_shards
from mmssl.data.shards import BadSample, SampleLimits, describe_problems, index_shards
from mmssl.data.shards.causes import account_of_indexes
from mmssl.data.shards.samples import parse_sample
from mmssl.data.shards.shard_index import ShardIndex
from mmssl.data.storage import LocalFiles
from tests.helpers.images import encode, photo
from tests.helpers.tars import File, pair, tar_bytes, toy_stream

IMAGE = encode(photo(24, 24), "PNG")


def real(key: str) -> list[File]:
    """The files of a pair whose image can be decoded."""
    return [(f"{key}.png", IMAGE), (f"{key}.txt", f"caption of {key}".encode())]


def index(path: Path, content: bytes) -> ShardIndex:
    """The index of a shard with this content."""
    path.write_bytes(content)
    return index_shards([str(path)], SampleLimits())[0]


def by_range(found: ShardIndex) -> dict[str, str]:
    """Key -> caption of every usable sample, read by its range."""
    files = LocalFiles()
    samples = [
        parse_sample(0, found.shard, files.read(found.shard, int(a), int(b)), SampleLimits())
        for a, b in zip(*found.ranges(), strict=True)
    ]
    files.close()
    return {sample.key: sample.fields["txt"] for sample in samples}


def in_order(found: ShardIndex) -> dict[str, str]:
    """The same, read from beginning to end."""
    ignored: list[BadSample] = []
    return {s.key: s.fields["txt"] for s in iter_samples([found.shard], on_bad=ignored.append)}


@pytest.mark.parametrize("part", ["header", "inside", "everything after"])
@pytest.mark.parametrize("place", [0.2, 0.4, 0.9])
def test_a_hole_of_zeros_is_damage(tmp_path: Path, place: float, part: str) -> None:
    """Zeros from any place on, or in the middle: pairs before it are used, the loss is named with its size by index,
    check and training. A pair whose last bytes are zeros is not used."""
    whole = tar_bytes(f for i in range(120) for f in real(f"{i:03}"))
    content = bytearray(whole)
    begin = int(len(whole) * place) + (0 if part == "inside" else -int(len(whole) * place) % 512)
    stop = min(len(whole), begin + 20_480) if part == "header" else len(whole)
    content[begin:stop] = bytes(stop - begin)
    found = index(tmp_path / "x.tar", bytes(content))
    used = by_range(found)
    assert used == in_order(found)
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        ends = [member.offset_data + member.size for member in tar if member.name.endswith(".txt")]
    assert used == {f"{i:03}": f"caption of {i:03}" for i in range(sum(end <= begin for end in ends))}
    (problem,) = found.problems
    assert "zeros" in problem
    assert "about" in problem
    assert "again" in problem
    survey = survey_shards([found.shard], problems=[f"{found.shard}: {problem}"])
    assert len(survey) == len(used)
    assert check_health(survey).samples["damaged shards"] == [f"{found.shard}: {problem}"]


def test_training_names_a_hole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The loader's log names the shard and the number of bytes that are not used."""
    whole = tar_bytes(f for i in range(60) for f in pair(f"{i:03}", 2000))
    index(tmp_path / "x.tar", whole[: len(whole) // 2] + bytes(len(whole) // 2))
    with toy_stream([str(tmp_path / "x.tar")], lanes=1) as stream:
        assert len(next(stream)) == 8
    assert "damaged shards: 1" in caplog.text
    assert "holds zeros" in caplog.text


@pytest.mark.parametrize("padding", [1024, 10_240, 65_536, 1 << 20])
def test_the_padding_of_tar_writers_is_no_damage(tmp_path: Path, padding: int) -> None:
    """Writers with any record size end an archive with zeros up to a multiple of it."""
    files = tar_bytes(pair("a")).rstrip(b"\0")
    content = files.ljust(-(-(len(files) + 1024) // padding) * padding, b"\0")
    assert index(tmp_path / "x.tar", content).problems == ()


@pytest.mark.parametrize("size", [512, 1024, 10_240, 1 << 20])
def test_a_shard_of_zeros_is_named(tmp_path: Path, size: int) -> None:
    """A file of nothing but zeros, of any size, is no empty success."""
    found = index(tmp_path / "x.tar", bytes(size))
    assert found.samples == 0
    assert "holds only zeros" in found.problems[0]


TAR = tar_bytes(pair("a"))
FOREIGN = {
    "gzip": (gzip.compress(TAR), "gzip -dc"),
    "bzip2": (bz2.compress(TAR), "bzip2 -dc"),
    "xz": (lzma.compress(TAR), "xz -dc"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(range(256)) * 8, "zstd -dc"),
    "zip": (b"PK\x03\x04" + bytes(range(256)) * 8, "unpack it"),
    "page": (b"<!DOCTYPE html><html><body>404 Not Found</body></html>" * 20, "web page"),
    "xml": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>" * 20, "download the shard again"),
    "stub": (b"AccessDenied", "it is text ('AccessDenied')"),
    "json": (b'{"error": "quota exceeded"}' * 40, "it is text"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "git lfs pull"),
    "parquet": (b"PAR1" + bytes(range(256)) * 8, "a Parquet table"),
    "image": (encode(photo(64, 64), "JPEG"), "an image"),
}


@pytest.mark.parametrize("kind", list(FOREIGN))
def test_a_file_that_is_no_tar_says_what_it_is(tmp_path: Path, kind: str) -> None:
    """Compressed tars, error pages, stubs and other files are named, with what to do, by the index and when read."""
    content, says = FOREIGN[kind]
    found = index(tmp_path / "x.tar", content)
    assert found.samples == 0
    assert says in found.problems[0]
    bad: list[BadSample] = []
    assert not list(iter_samples([found.shard], on_bad=bad.append))
    assert says in bad[-1].error


@pytest.mark.parametrize(
    "keys",
    [
        [f"photo_{i}.v1.0" for i in range(12)],
        [f"2024.{i:02}" for i in range(12)],
        [f"part/sub.dir/a.b{i}" for i in range(12)],
        [f"www.site.org.{i}" for i in range(12)],
        [*(f"plain{i}" for i in range(6)), *(f"x.y{i}" for i in range(6))],
        ["photo", *(f"photo.v{i}" for i in range(1, 12))],
    ],
)
def test_names_with_dots_are_pairs(tmp_path: Path, keys: list[str]) -> None:
    """Each image goes with the text of its own name, however many dots it has: by range and in order."""
    found = index(tmp_path / "x.tar", tar_bytes(f for key in keys for f in pair(key)))
    expected = {key: f"caption of {key}" for key in keys}
    assert by_range(found) == expected
    assert in_order(found) == expected
    assert account_of_indexes([found]).summary() == "12 pairs offered = 12 used + 0 left out"


def test_dotted_masks_and_crops_belong_to_their_image(tmp_path: Path) -> None:
    """WebDataset's further members, such as `a.seg.png`, are no samples of their own."""
    files = [f for i in range(3) for f in (*pair(f"a{i}"), (f"a{i}.seg.png", b"mask"), (f"a{i}.seg.json", b"{}"))]
    assert list(by_range(index(tmp_path / "x.tar", tar_bytes(files)))) == ["a0", "a1", "a2"]


def apart(order: str, keys: list[str]) -> list[File]:
    """Pairs whose members are not neighbours."""
    files = [f for key in keys for f in pair(key)]
    if order == "images first":
        return files[::2] + files[1::2]
    if order == "texts first":
        return files[1::2] + files[::2]
    if order == "shuffled":
        random.Random(4).shuffle(files)
        return files
    return [(f"{'images' if name.endswith('jpg') else 'captions'}/{name}", content) for name, content in files]


@pytest.mark.parametrize("dotted", [False, True])
@pytest.mark.parametrize("order", ["images first", "texts first", "shuffled", "two folders"])
def test_members_apart_are_counted_as_pairs(tmp_path: Path, order: str, dotted: bool) -> None:
    """Twelve pairs are offered, not one and not 24, with the cause, the remedy and one line for all."""
    keys = [f"2024.{i:02}" if dotted else f"{i:02}" for i in range(12)]
    found = index(tmp_path / "x.tar", tar_bytes(apart(order, keys)))
    account = account_of_indexes([found])
    assert account.offered == 12
    assert account.used == len(by_range(found)) == len(in_order(found))
    assert account.used < 6
    line = describe_problems([found])
    assert line is not None
    assert line.count(" left out: its") == len(account.left_out)
    assert ("tar --sort=name" in line) == (order != "two folders")
    assert "mmssl shards pack" in line
    survey = survey_shards([found.shard])
    assert len(survey.bad) + account.used >= 12


def test_files_of_desktops_are_no_samples(tmp_path: Path) -> None:
    """AppleDouble files, __MACOSX, .DS_Store and hidden members neither count nor part the members of a pair."""
    double = b"\0\5\x16\7Mac OS X" + bytes(160)
    files = [f for i in range(6) for name, content in pair(f"{i}") for f in ((f"._{name}", double), (name, content))]
    files += [("__MACOSX/0.jpg", double), ("__MACOSX/._0.txt", double), (".DS_Store", b"x"), (".hidden.jpg", b"x")]
    found = index(tmp_path / "x.tar", tar_bytes(files))
    assert list(by_range(found)) == [f"{i}" for i in range(6)]
    assert found.left_out == ()


@pytest.mark.parametrize(("image", "text"), [("img_content", "caption"), ("input.jpg", "output.txt"), ("jpg", "text")])
def test_members_with_other_names_are_named(tmp_path: Path, image: str, text: str) -> None:
    """The reason shows the members that are there, and the remedy names the option that maps them."""
    files = [f for i in range(5) for f in ((f"{i}.{image}", IMAGE), (f"{i}.{text}", b"a caption"))]
    account = account_of_indexes([index(tmp_path / "x.tar", tar_bytes(files))])
    assert (account.offered, account.used) == (5, 0)
    (omission,) = account.left_out.values()
    assert f"its members are .{image}, .{text}" in omission.example
    assert "data.members" in omission.remedy
