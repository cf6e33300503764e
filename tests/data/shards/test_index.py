"""The index finds every sample and every defect from the headers, and is remade when its shard changes."""

import io
import json
import os
import shutil
import tarfile
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from webdataset.tariterators import group_by_keys, tar_file_expander

from mmssl.data.shards import FOLDER_FILE, SampleLimits, ShardIndex, describe_problems, index_shards
from mmssl.data.shards import index as index_module
from mmssl.data.shards.groups import FRAGMENT
from mmssl.data.shards.index import fingerprint
from mmssl.data.shards.samples import parse_sample
from mmssl.data.shards.shard_index import index_shard
from mmssl.data.storage import LocalFiles
from mmssl.errors import UserError
from mmssl.types import Sample
from tests.helpers.tars import File, pair, tar_bytes, write_shards

LIMITS = SampleLimits()


def write(folder: Path, files: list[File], name: str = "x.tar", fmt: int = tarfile.USTAR_FORMAT) -> str:
    """A shard with these files."""
    path = folder / name
    path.write_bytes(tar_bytes(files, fmt))
    return str(path)


class Parsed(dict[str, Any]):
    """A folder's entries; a plain dict cannot be watched."""


def samples_of(index: ShardIndex) -> list[Sample]:
    """Every usable sample, read by its range."""
    files = LocalFiles()
    bounds = zip(*index.ranges(), strict=True)
    samples = [
        parse_sample(i, index.shard, files.read(index.shard, int(a), int(b)), LIMITS) for i, (a, b) in enumerate(bounds)
    ]
    files.close()
    return samples


def reasons(index: ShardIndex) -> dict[str, str]:
    """Key -> why it was left out."""
    return {out.key: out.reason for out in index.left_out}


@pytest.mark.parametrize("fmt", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_ranges_hold_the_samples_that_webdataset_reads(tmp_path: Path, fmt: int) -> None:
    """Every format, with folders, long and non-ASCII names, further members and capitals, as webdataset
    groups them."""
    deep = "/".join(["folder-of-some-length"] * (4 if fmt == tarfile.USTAR_FORMAT else 12))
    long = f"{deep}/a"
    files = [*pair("a"), *pair("sub/a"), *pair(long), *pair("ü/é"), ("README", b"hello"), ("j.PNG", b"image")]
    files += [("j.json", b'{"note": "t"}'), ("j.cls", b"7"), ("j.seg.png", b"mask"), ("j.npy", b"\x93NUMPY")]
    shard = write(tmp_path, files, fmt=fmt)
    found = index_shard(shard, LIMITS)
    read = samples_of(found)
    with Path(shard).open("rb") as stream:
        groups = list(group_by_keys(tar_file_expander([{"url": shard, "stream": stream}])))
    assert [s.key for s in read] == [group["__key__"] for group in groups]
    assert [s.image for s in read] == [group.get("jpg", group.get("png")) for group in groups]
    assert [s.fields.get("txt", "").encode() for s in read] == [group.get("txt", b"") for group in groups]
    assert read[-1].fields == {"note": "t", "cls": 7}
    assert not found.left_out
    assert not found.problems


def test_offsets_file_has_the_documented_layout(tmp_path: Path) -> None:
    """N + 1 little-endian uint64 beside the shard: each sample's first header, then the end of the last
    sample."""
    (shard,) = write_shards(tmp_path, [5])
    index_shards([shard], LIMITS)
    offsets = np.frombuffer(Path(f"{shard}.idx").read_bytes(), dtype="<u8")
    with tarfile.open(shard) as tar:
        starts = [member.offset for member in tar if member.name.endswith(".jpg")]
        end = tar.offset
    assert offsets[:-1].tolist() == starts
    assert offsets[-1] == end
    entry = json.loads((tmp_path / FOLDER_FILE).read_text())["shards"]["00000.tar"]
    assert (entry["samples"], entry["bytes"], entry["left_out"]) == (5, os.path.getsize(shard), [])  # noqa: PTH202


def test_kept_index_is_read_back_and_not_made_again(tmp_path: Path) -> None:
    """The second call gives the same index although the shards, of unchanged size and time, hold only zeros."""
    shards = write_shards(tmp_path, [3, 0, 4])
    made = index_shards(shards, LIMITS)
    ranges = [[array.tolist() for array in index.ranges()] for index in made]
    for shard in map(Path, shards):
        status = shard.stat()
        shard.write_bytes(bytes(status.st_size))
        os.utime(shard, ns=(0, status.st_mtime_ns))
    kept = index_shards(shards, LIMITS)
    assert kept == made
    assert [[array.tolist() for array in index.ranges()] for index in kept] == ranges


@pytest.mark.parametrize("lost", ["00000.tar.idx", FOLDER_FILE])
def test_deleted_or_damaged_index_is_rebuilt(tmp_path: Path, lost: str) -> None:
    """Removing or damaging either file only costs time."""
    shards = write_shards(tmp_path, [3, 2])
    made = index_shards(shards, LIMITS)
    expected = [samples_of(i) for i in made]
    for content in (None, b"", b"damaged", b"\xff" * 32):
        (tmp_path / lost).unlink()
        if content is not None:
            (tmp_path / lost).write_bytes(content)
        assert [samples_of(i) for i in index_shards(shards, LIMITS)] == expected
    (tmp_path / lost).unlink()
    assert [samples_of(i) for i in made] == expected, "an index in use survives the loss of its files"


@pytest.mark.parametrize(
    "change",
    [
        {"groups": -3},
        {"samples": -1, "groups": -1},
        {"bytes": -1},
        {"samples": 99},
        {"groups": "3"},
        {"groups": 3.0},
        {"groups": True, "samples": True},
        {"left_out": [[0, "a", "b"]]},
        {"left_out": [[-1, "a", "b"]], "samples": 2},
        {"left_out": [[0, "a", "b"], [0, "a", "b"]], "samples": 1},
        {"left_out": [[0, "a", "b"]], "samples": 2},
        {"left_out": 7},
        {"max_member_bytes": None},
        {"checksum": 5},
        {"problems": 5},
    ],
)
def test_an_entry_with_impossible_or_altered_counts_is_rebuilt(tmp_path: Path, change: dict[str, Any]) -> None:
    """Counts below 0, of another type or that do not add up, and samples left out that the index did not leave out:
    the shard is read again, and its entry written anew."""
    shards = write_shards(tmp_path, [3, 2])
    made = index_shards(shards, LIMITS)
    expected = [samples_of(i) for i in made]
    path = tmp_path / FOLDER_FILE
    tree = json.loads(path.read_text())
    whole = dict(tree["shards"]["00000.tar"])
    tree["shards"]["00000.tar"].update(change)
    path.write_text(json.dumps(tree))
    assert [samples_of(i) for i in index_shards(shards, LIMITS)] == expected
    assert json.loads(path.read_text())["shards"]["00000.tar"] == whole


def test_changed_shard_is_indexed_again(tmp_path: Path) -> None:
    """A different size or modification time makes the stored index stale."""
    (shard,) = write_shards(tmp_path, [3])
    index_shards([shard], LIMITS)
    write(tmp_path, [f for i in range(4) for f in pair(f"new-{i}")], "00000.tar")
    assert [s.key for s in samples_of(index_shards([shard], LIMITS)[0])] == [f"new-{i}" for i in range(4)]
    status = os.stat(shard)  # noqa: PTH116
    write(tmp_path, [f for i in range(4) for f in pair(f"old-{i}")], "00000.tar")
    os.utime(shard, ns=(0, status.st_mtime_ns + 1))
    assert [s.key for s in samples_of(index_shards([shard], LIMITS)[0])] == [f"old-{i}" for i in range(4)]


def test_other_limits_make_another_index(tmp_path: Path) -> None:
    """A sample excluded under one limit is included under a larger one."""
    shard = write(tmp_path, [*pair("big", 5000), *pair("small")])
    assert "more than the limit of 4000" in reasons(index_shards([shard], SampleLimits(4000))[0])["big"]
    assert index_shards([shard], SampleLimits(6000))[0].samples == 2


def test_folder_that_cannot_be_written_keeps_the_index_in_memory(tmp_path: Path) -> None:
    """No file is left behind, and the index works from memory."""
    (shard,) = write_shards(tmp_path, [3])
    Path(f"{shard}.idx").mkdir()
    (found,) = index_shards([shard], LIMITS)
    assert [s.key for s in samples_of(found)] == ["0-0", "0-1", "0-2"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.tar", "00000.tar.idx"]


def test_one_folder_at_a_time_is_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many folders whose indexes fit, the file of one is in memory at a time; the indexes are as of each alone."""
    shards = [shard for i in range(9) for shard in write_shards(tmp_path / str(i), [3, 2])]
    made = [index_shards([shard], LIMITS)[0] for shard in shards]
    parsed: list[weakref.ref[Parsed]] = []
    most = 0
    read = index_module._read_folder

    def watched(folder: Path) -> dict[str, Any]:
        nonlocal most
        entries = Parsed(read(folder))
        parsed.append(weakref.ref(entries))
        most = max(most, sum(entry() is not None for entry in parsed))
        return entries

    monkeypatch.setattr(index_module, "_read_folder", watched)
    assert index_shards(shards[::-1], LIMITS) == made[::-1]
    assert len(parsed) == 9
    assert most <= 2, "the last one may live until the next is read"


def test_an_interrupted_index_keeps_what_was_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Indexes are written in groups: after a failure in the seventh shard, the first six are kept."""
    monkeypatch.setattr("mmssl.data.shards.index._TOGETHER", 3)
    shards = write_shards(tmp_path, [1] * 8)
    (tmp_path / "00006.tar").unlink()
    (tmp_path / "00006.tar").mkdir()
    with pytest.raises(UserError, match=r"00006\.tar cannot be read"):
        index_shards(shards, LIMITS)
    assert sorted(path.name for path in tmp_path.glob("*.idx")) == [f"0000{i}.tar.idx" for i in range(6)]
    assert list(json.loads((tmp_path / FOLDER_FILE).read_text())["shards"]) == [f"0000{i}.tar" for i in range(6)]


@pytest.mark.slow
def test_two_processes_give_the_index_of_one(tmp_path: Path) -> None:
    """Indexing in processes changes nothing, and progress counts every shard."""
    shards = write_shards(tmp_path / "a", [3, 1, 2])
    seen: list[tuple[int, int]] = []
    made = index_shards(shards, LIMITS, processes=2, progress=lambda *now: seen.append(now))
    assert [i.samples for i in made] == [3, 1, 2]
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_faults_of_samples_are_named(tmp_path: Path) -> None:
    """Incomplete pairs, repeated keys, scattered keys and large members are excluded with a reason, the rest kept."""
    files = [
        *pair("good"),
        ("no-text.jpg", b"i"),
        ("no-image.txt", b"t"),
        *pair("twice"),
        ("split.jpg", b"i"),
        *pair("twice"),
        ("split.txt", b"t"),
        *pair("adjacent"),
        *pair("adjacent"),
        *pair("huge", 9000),
        ("label.jpg", b"i"),
        ("label.cls", b"1"),
        *pair("last"),
    ]
    found = index_shard(write(tmp_path, files), SampleLimits(8000))
    assert [s.key for s in samples_of(found)] == ["good", "twice", "adjacent", "last"]
    assert [(out.key, out.reason) for out in found.left_out] == [
        ("no-text", "no text"),
        ("no-image", "no image"),
        ("split", "its members are not adjacent"),
        ("twice", "its key was used before"),
        ("split", FRAGMENT),
        ("adjacent", "its key was used before"),
        ("huge", ".jpg has 9000 bytes, more than the limit of 8000"),
        ("label", "no text"),
    ]


def test_sample_that_spans_too_much_is_left_out(tmp_path: Path) -> None:
    """Many members below the limit cannot add up to a huge read."""
    files = [*pair("a"), *((f"a.{i}", b"0" * 900) for i in range(5)), *pair("b")]
    found = index_shard(write(tmp_path, files), SampleLimits(1000))
    assert reasons(found) == {"a": "its members span 9728 bytes"}


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (tarfile.SYMTYPE, "symbolic link"),
        (tarfile.LNKTYPE, "hard link"),
        (tarfile.CHRTYPE, "device"),
        (tarfile.BLKTYPE, "device"),
        (tarfile.FIFOTYPE, "pipe"),
        (b"Z", "unknown type"),
    ],
)
def test_members_that_are_no_files_are_refused(tmp_path: Path, kind: bytes, reason: str) -> None:
    """A sample with a link or a device is excluded; folders are ignored."""
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("a.jpg", "a.txt", "b.jpg", "b.txt"):
            info = tarfile.TarInfo(name)
            if name == "a.jpg":
                info.type, info.linkname = kind, "/etc/passwd"
            else:
                info.size = 1
            tar.addfile(info, io.BytesIO(b"c"))
        folder = tarfile.TarInfo("c.jpg")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    found = index_shard(str(path), LIMITS)
    assert list(reasons(found)) == ["a"]
    assert reason in reasons(found)["a"]
    assert [s.key for s in samples_of(found)] == ["b"]


def test_names_with_a_line_break_are_refused(tmp_path: Path) -> None:
    """The report names such a sample in one line, so that its name is not taken for another line."""
    forged = "x\n2 pairs offered = 2 used + 0 left out\ny"
    found = index_shard(write(tmp_path, [*pair(forged), *pair("good")]), LIMITS)
    assert [s.key for s in samples_of(found)] == ["good"]
    report = describe_problems([found])
    assert report is not None
    assert "name with a line break" in report
    assert "\n" not in report


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/../../x"])
def test_names_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    """Samples with absolute names or `..` are excluded and named."""
    found = index_shard(write(tmp_path, [*pair(name), *pair("good")]), LIMITS)
    assert [s.key for s in samples_of(found)] == ["good"]
    assert all("leaves the folder" in reason for reason in reasons(found).values())


def test_faults_of_shards_are_named(tmp_path: Path) -> None:
    """Empty, cut, overlong and non-tar files are reported; complete samples are kept."""
    whole = tar_bytes([*pair("a"), *pair("b")])
    end = 8 * 512
    cases = {
        b"": (0, "the file is empty"),
        whole[:end]: (2, "no end marker"),
        whole: (2, None),
        whole + b"x": (2, "after its end marker"),
        whole[: end - 512]: (1, "bytes promised, 0 present"),
        whole[: end - 400]: (1, "its last block is not full"),
        b"not a tar" * 200: (0, "it is text ('not a tar"),
        b"\1\2\3" * 600: (0, "damaged header at byte 0"),
        whole[: end - 1000]: (1, "inside a header"),
    }
    for content, (samples, problem) in cases.items():
        path = tmp_path / "x.tar"
        path.write_bytes(content)
        found = index_shard(str(path), LIMITS)
        assert found.samples == samples, problem
        assert (problem is None) == (found.problems == ())
        assert problem is None or problem in found.problems[0]


def test_report_counts_and_names(tmp_path: Path) -> None:
    """Good shards give None; others one line with the counts and the first names."""
    good, bad = write_shards(tmp_path, [2]), write(tmp_path, [("a.jpg", b""), *pair("b")], "bad.tar")
    assert describe_problems(index_shards(good, LIMITS)) is None
    line = describe_problems(index_shards([*good, bad], LIMITS))
    assert line == (
        f"unusable samples left out: 1, damaged shards: 0; 1 left out: no text, for example {bad}:a (no text); "
        "to use it: put KEY.txt, or KEY.json with a caption, beside KEY.jpg in the tar"
    )


def test_fingerprint_tells_data_not_place(tmp_path: Path) -> None:
    """A moved folder has the same fingerprint; another sample, size or exclusion changes it."""
    shards = write_shards(tmp_path / "a", [3, 2])
    first = fingerprint(index_shards(shards, LIMITS))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    moved = [str(tmp_path / "b" / Path(shard).name) for shard in shards]
    assert fingerprint(index_shards(moved, LIMITS)) == first
    assert fingerprint(index_shards(shards, SampleLimits(44))) != first
    assert fingerprint(index_shards(shards[:1], LIMITS)) != first
    assert fingerprint(index_shards(write_shards(tmp_path / "c", [2, 3]), LIMITS)) != first


def test_shard_that_cannot_be_read_is_an_error_of_one_line(tmp_path: Path) -> None:
    """A folder instead of a shard is an error that names it."""
    (tmp_path / "x.tar").mkdir()
    with pytest.raises(UserError, match=r"x\.tar cannot be read"):
        index_shards([str(tmp_path / "x.tar")], LIMITS)
