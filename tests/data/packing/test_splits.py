"""Splits: fractions, groups that stay together, and a field that names them, of every kind of source."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmssl.data import iter_samples
from mmssl.data.packing.packer import Packed, pack
from mmssl.data.packing.splits import join_owners
from mmssl.data.packing.tables import open_records
from mmssl.errors import UserError
from tests.helpers.images import encode
from tests.helpers.tars import tar_bytes

NAMES = ["train", "Train", "val", "test", " train ", "train", None, "", "val", "train"]
"""The split of each of ten images as it is written."""
SPLIT = {number: name.strip().lower() for number, name in enumerate(NAMES) if name}
"""The split of each image, where it has one."""


def image(number: int) -> bytes:
    """A small image unlike the others."""
    return encode(Image.new("RGB", (12, 10), (number * 20, 99, 255 - number * 20)), "PNG")


def write_folder(root: Path) -> Path:
    """Images with captions and the split in the .json beside them."""
    root.mkdir()
    for number, name in enumerate(NAMES):
        (root / f"{number}.png").write_bytes(image(number))
        (root / f"{number}.json").write_text(json.dumps({"caption": f"number {number}", "Split": name}))
    return root


def write_folders(root: Path) -> Path:
    """Images in one folder per split; those without one lie above."""
    for number in range(len(NAMES)):
        place = root / SPLIT.get(number, "") / "deeper" if number in SPLIT else root
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.png").write_bytes(image(number))
        (place / f"{number}.txt").write_text(f"number {number}")
    return root


def write_table(root: Path) -> Path:
    """A table with a column of splits."""
    write_folder(root)
    rows = "".join(f"{number}.png,number {number},{name or ''}\n" for number, name in enumerate(NAMES))
    (root / "t.csv").write_text("image,caption,Split\n" + rows)
    return root / "t.csv"


def write_lines(root: Path) -> Path:
    """A table of JSON lines, whose rows without a split lack the field or hold null."""
    write_folder(root)
    rows = [
        {"image": f"{n}.png", "caption": f"number {n}"} | ({} if name == "" else {"split": name})
        for n, name in enumerate(NAMES)
    ]
    (root / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root / "t.jsonl"


def write_tar(root: Path) -> Path:
    """A shard whose samples name their split in the .json."""
    root.mkdir()
    files = []
    for number, name in enumerate(NAMES):
        fields = json.dumps({"split": name}).encode()
        files += [
            (f"{number}.png", image(number)),
            (f"{number}.txt", b"number %d" % number),
            (f"{number}.json", fields),
        ]
    (root / "x.tar").write_bytes(tar_bytes(files))
    return root / "x.tar"


SOURCES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "folder": (write_folder, "split"),
    "folders": (write_folders, "folder"),
    "table": (write_table, "split"),
    "json lines": (write_lines, "Split"),
    "tar": (write_tar, "split"),
}


def captions(packed: Packed) -> dict[str, set[str]]:
    """Split -> the captions of its samples."""
    return {
        name: {s.fields["txt"] for s in iter_samples(list(map(str, paths)))} for name, paths in packed.shards.items()
    }


@pytest.mark.parametrize("kind", SOURCES)
def test_a_field_names_the_splits(kind: str, tmp_path: Path) -> None:
    """From every kind of source, each pair is in the split that its field names, in any case; those without are
    counted; a second call changes nothing."""
    write, field = SOURCES[kind]
    source = write(tmp_path / "in")
    packed = pack(open_records(source), tmp_path / "out", splits=field)
    expected = {name: {f"number {n}" for n, own in SPLIT.items() if own == name} for name in ("train", "val", "test")}
    assert captions(packed) == expected
    assert packed.account.summary() == "10 pairs offered = 8 used + 2 left out (no split is named: 2)"
    assert (tmp_path / "out" / "val-00000.tar").is_file()
    again = pack(open_records(source), tmp_path / "out", splits=field)
    assert (again.samples, again.account) == (0, packed.account)
    with pytest.raises(UserError, match=r"has no (field|column) 'fold'; its (field|column)s are .*(?i:split|folder)"):
        pack(open_records(source), tmp_path / "other", splits="fold")


def test_an_image_is_in_one_split(tmp_path: Path) -> None:
    """Rows of one image, or of one group, that name two splits: the later ones are left out, so that nothing leaks."""
    write_folder(tmp_path / "in")
    rows = [
        "0.png,a one,train,p1",
        "0.png,a two,val,p2",
        "1.png,a three,val,p3",
        "2.png,a four,train,p3",
        "3.png,a five,val,p4",
    ]
    (tmp_path / "in" / "t.csv").write_text("image,caption,split,patient\n" + "\n".join(rows))
    packed = pack(open_records(tmp_path / "in" / "t.csv"), tmp_path / "a", splits="split")
    assert captions(packed) == {"train": {"a one", "a four"}, "val": {"a three", "a five"}}
    grouped = pack(open_records(tmp_path / "in" / "t.csv"), tmp_path / "b", splits="split", group_by="patient")
    assert captions(grouped) == {"train": {"a one"}, "val": {"a three", "a five"}}
    assert {cause: o.pairs for cause, o in grouped.account.left_out.items()} == {
        "its image or group is in another split": 2
    }


def test_a_field_of_something_else_names_no_splits(tmp_path: Path) -> None:
    """A column of numbers or captions is refused in one line, with an example of what it holds."""
    (tmp_path / "t.csv").write_text("image,caption,n,none\n" + "".join(f"{i}.png,a thing,{i},\n" for i in range(30)))
    for field, words in (("n", "30 values, such as 0, 1, 2"), ("none", "holds nothing")):
        with pytest.raises(
            UserError, match=rf"the field '{field}' {'holds ' if 'values' in words else ''}{words}; name a field"
        ):
            pack(open_records(tmp_path / "t.csv"), tmp_path / "out", splits=field)


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_groups_of_folders_and_tars_stay_together(kind: str, tmp_path: Path) -> None:
    """The field of a .json groups pairs as a column of a table does."""
    write, _ = SOURCES[kind]
    packed = pack(open_records(write(tmp_path / "in")), tmp_path / "out", splits={"a": 1, "b": 1}, group_by="split")
    found = captions(packed)
    assert sum(map(len, found.values())) == 10
    for name in ("train", "Train", " train ", "val"):  # groups are compared as they are written
        own = {f"number {n}" for n, other in enumerate(NAMES) if other == name}
        assert own <= found["a"] or own <= found["b"]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from([None, "", "a", "b", "c", "d", 7])), max_size=14))
def test_groups_and_images_are_joined(rows: list[tuple[int, Any]]) -> None:
    """Two records have one owner exactly if a chain of equal images and equal groups leads from one to the other."""
    owners, groups = [str(image) for image, _ in rows], [group for _, group in rows]
    graph = nx.Graph()
    graph.add_nodes_from(("image", owner) for owner in owners)
    pairs = zip(owners, groups, strict=True)
    graph.add_edges_from((("image", owner), ("group", str(group))) for owner, group in pairs if group not in (None, ""))
    found = join_owners(owners, groups)
    expected = {node: number for number, part in enumerate(nx.connected_components(graph)) for node in part}
    for i, first in enumerate(owners):
        for j, second in enumerate(owners):
            assert (found[i] == found[j]) == (expected["image", first] == expected["image", second])
    assert set(found) <= set(owners)


def test_a_group_stays_in_one_split(tmp_path: Path) -> None:
    """With group_by, no value of the column is in two splits, and all rows are packed; an unknown column is refused."""
    for number in range(60):
        Image.new("RGB", (8, 8), (number * 4, 9, 9)).save(tmp_path / f"{number}.png")
    rows = "".join(f"{number}.png,seen {number},p{number % 20}\n" for number in range(60))
    (tmp_path / "t.csv").write_text(f"image,caption,Patient\n{rows}")
    records = open_records(tmp_path / "t.csv")
    packed = pack(records, tmp_path / "out", splits={"train": 0.5, "val": 0.5}, group_by="patient")
    split = {name: {s.fields["Patient"] for s in iter_samples(list(map(str, p)))} for name, p in packed.shards.items()}
    assert packed.samples == 60
    assert split["train"]
    assert split["val"]
    assert not split["train"] & split["val"]
    with pytest.raises(UserError, match="no column 'product'; its columns are image, caption, Patient"):
        pack(records, tmp_path / "x", group_by="product")
