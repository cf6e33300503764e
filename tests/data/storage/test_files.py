"""Files give samples, or an error that names the sample."""

from functools import partial
from pathlib import Path

import pytest

from mmssl.data import iter_samples
from mmssl.data.shards import BadSample, SampleLimits
from mmssl.data.shards.samples import SampleError, parse_sample
from mmssl.data.shards.shard_index import index_shard
from mmssl.data.storage import Access, LocalFiles
from mmssl.errors import UserError
from tests.helpers.tars import File, pair, tar_bytes, write_shards

LIMITS = SampleLimits()


def sample_bytes(*files: File) -> bytes:
    """The members of one sample, without the end marker."""
    size = sum(512 + -(-len(content) // 512) * 512 for _, content in files)
    return tar_bytes(files)[:size]


def test_fields_hold_every_text_member() -> None:
    """`txt` is text, `cls` a number, JSON's entries stand under their own names and give way to members."""
    content = sample_bytes(
        ("d/a.json", b'{"title": "t", "txt": "other", "list": [1, "x"], "nan": NaN}'),
        ("d/a.webp", b"image"),
        ("d/a.txt", "\ufeffcaption é".encode()),
        ("d/a.cls", b" 12\n"),
        ("d/a.pyd", b"cos\nsystem\n(S'false'\ntR."),
    )
    sample = parse_sample(7, "x.tar", content, LIMITS)
    assert (sample.id, sample.shard, sample.key, sample.image) == (7, "x.tar", "d/a", b"image")
    assert sample.fields.pop("nan") != 0
    assert sample.fields == {"title": "t", "txt": "caption é", "list": [1, "x"], "cls": 12}


@pytest.mark.parametrize(
    ("text", "label"), [("-1", -1), ("cat", "cat"), ("", ""), ("9" * 30, "9" * 30), ("1_0", "1_0")]
)
def test_labels_that_are_no_numbers_stay_text(text: str, label: int | str) -> None:
    """Only plain digits become a class number."""
    assert parse_sample(0, "x", sample_bytes(*pair("a"), ("a.cls", text.encode())), LIMITS).fields["cls"] == label


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ([("a.jpg", b""), ("a.txt", b"caf\xe9")], r"\.txt is not UTF-8 \(byte 3\)"),
        ([("a.jpg", b""), ("a.json", b"\xff{}")], r"\.json is not UTF-8"),
        ([("a.jpg", b""), ("a.json", b"{")], r"\.json is damaged"),
        ([("a.jpg", b""), ("a.json", b"[1]")], r"\.json holds a list"),
        ([("a.jpg", b""), ("a.json", b"[" * 100_000)], r"\.json (is nested too deeply|is damaged)"),
        ([("a.jpg", b""), ("a.json", b'{"n": ' + b"9" * 5000 + b"}")], r"\.json is damaged"),
        ([("a.txt", b"t")], "no image"),
        ([], "no members"),
    ],
)
def test_members_that_cannot_be_parsed_are_sample_errors(files: list[File], says: str) -> None:
    """Damaged text is a one-line SampleError, never another exception."""
    with pytest.raises(SampleError, match=says) as error:
        parse_sample(0, "x", sample_bytes(*files), LIMITS)
    assert "\n" not in str(error.value)


def test_a_shard_that_changed_under_the_index_is_noticed(tmp_path: Path) -> None:
    """Changed or missing bytes of a sample are a SampleError."""
    (shard,) = write_shards(tmp_path, [3])
    starts, stops = index_shard(shard, LIMITS).ranges()
    content = Path(shard).read_bytes()
    Path(shard).write_bytes(content[: stops[1] - 700])
    files = LocalFiles()
    assert parse_sample(0, shard, files.read(shard, int(starts[0]), int(stops[0])), LIMITS).key == "0-0"
    with pytest.raises(SampleError, match="changed"):
        files.read(shard, int(starts[1]), int(stops[1]))
    files.close()
    with pytest.raises(SampleError, match="changed"):
        parse_sample(0, shard, b"\1" * 1024, LIMITS)
    with pytest.raises(SampleError, match="changed"):
        parse_sample(0, shard, content[: stops[0] - 512], LIMITS)


def test_files_are_kept_open_up_to_a_number(tmp_path: Path) -> None:
    """Reading 100 shards again and again holds at most 64 of them open, and closing holds none."""
    shards = write_shards(tmp_path, [1] * 100)
    files, before = LocalFiles(), len(list(Path("/proc/self/fd").iterdir()))
    for shard in shards * 2:
        assert len(files.read(shard, 0, 512)) == 512
    assert len(list(Path("/proc/self/fd").iterdir())) - before == 64
    files.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    with pytest.raises(UserError, match=r"gone\.tar cannot be opened"):
        files.read(str(tmp_path / "gone.tar"), 0, 1)


def test_many_workers_share_the_files_that_a_process_may_open(tmp_path: Path) -> None:
    """Sixteen threads hold no more shards open together than four: Linux lets a process open 1,024 files."""
    shards, before = write_shards(tmp_path, [1] * 70), len(list(Path("/proc/self/fd").iterdir()))
    for workers in (4, 16):
        workers_files = [Access().open(workers) for _ in range(workers)]
        for files in workers_files:
            for shard in map(partial(index_shard, limits=LIMITS), shards):
                files.read(shard, 0, 512)
        assert len(list(Path("/proc/self/fd").iterdir())) - before == 256
        for files in workers_files:
            files.close()


def test_a_shard_without_samples_is_named(tmp_path: Path) -> None:
    """An archive without samples or without files is reported."""
    for name, files in (("empty", []), ("other", [("README", b"text")])):
        (tmp_path / f"{name}.tar").write_bytes(tar_bytes(files))
        bad: list[BadSample] = []
        assert list(iter_samples([str(tmp_path / f"{name}.tar")], on_bad=bad.append)) == []
        assert [(b.key, b.error) for b in bad] == [("", "the shard holds no sample")]


def test_iter_samples_gives_what_the_index_gives(tmp_path: Path) -> None:
    """The same samples, numbers and exclusions as by index and range."""
    files = [
        *pair("a"),
        ("b.jpg", b"i"),
        *pair("c"),
        *pair("a"),
        ("d.jpg", b"i"),
        ("d.txt", b"\xff"),
        *pair("e"),
    ]
    path = tmp_path / "x.tar"
    path.write_bytes(tar_bytes(files))
    shards = [str(path), *write_shards(tmp_path / "more", [2, 3])]
    bad: list[BadSample] = []
    found = list(iter_samples(shards, on_bad=bad.append))
    assert [s.key for s in found] == ["a", "c", "e", "0-0", "0-1", "1-0", "1-1", "1-2"]
    assert [s.id for s in found] == [0, 1, 3, 4, 5, 6, 7, 8]
    assert [(b.key, b.error) for b in bad] == [
        ("b", "no text"),
        ("a", "its key was used before"),
        ("d", ".txt is not UTF-8 (byte 0)"),
    ]
    first = index_shard(shards[0], LIMITS)
    reader = LocalFiles()
    for number, (start, stop) in enumerate(zip(*first.ranges(), strict=True)):
        content = reader.read(shards[0], int(start), int(stop))
        if number != 2:
            assert parse_sample(number, shards[0], content, LIMITS) in found
    reader.close()


def test_iter_samples_without_texts_and_with_damage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Labelled images need no caption; a cut shard gives its complete samples and is logged by default."""
    path = tmp_path / "x.tar"
    path.write_bytes(tar_bytes([("a.webp", b"i"), ("a.cls", b"3"), ("b.png", b"j" * 700)])[:2600])
    (sample,) = iter_samples([str(path)], need_text=False)
    assert (sample.key, sample.fields) == ("a", {"cls": 3})
    assert "1 left out: .png is cut, for example" in caplog.text
    assert "the rest of the shard is not used" in caplog.text
    with pytest.raises(UserError, match="cannot be read: No such file"):
        list(iter_samples([str(tmp_path / "gone.tar")]))
