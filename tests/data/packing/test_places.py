"""Where the images of a table lie: each cell leads to its own file, or is left out; a guess is said."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from mmssl.data import iter_samples
from mmssl.data.packing import open_records, pack
from tests.helpers.images import encode


def image(number: int) -> bytes:
    """A small image unlike the others."""
    return encode(Image.new("RGB", (8, 8), (number * 20, 99, 7)), "PNG")


@dataclass(frozen=True)
class Layout:
    """A dataset on a disk."""

    disk: Sequence[str]
    """Paths of the images; each is the number of its place here."""
    rows: Sequence[Sequence[str]]
    """The table; the caption of the image with number n ends in n."""
    used: Sequence[int]
    """Numbers of the images that are packed."""
    says: str = ""
    """A part of what is printed about the table."""
    table: str = "t.csv"
    column: str | None = None
    """The image column that is named."""
    left_out: Mapping[str, int] | None = None


def rows_of(names: Sequence[str], first: int = 0) -> list[list[str]]:
    """A header, and a row for each name."""
    return [["image", "caption"], *([name, f"this is {number}"] for number, name in enumerate(names, start=first))]


SIX = range(6)
LAYOUTS = {
    "karpathy": Layout(
        [f"{'val2014' if n < 4 else 'train2014'}/{n}.png" for n in SIX],
        [
            ["filepath", "filename", "caption"],
            *(["val2014" if n < 4 else "train2014", f"{n}.png", f"this is {n}"] for n in SIX),
        ],
        SIX,
        "images in {root} in folders of column 'filepath'",
    ),
    "equal names in folders of splits": Layout(
        [f"{'train' if n < 3 else 'test'}/{n % 3}.png" for n in SIX],
        [
            ["split", "image", "caption"],
            *(["train" if n < 3 else "test", f"{n % 3}.png", f"this is {n}"] for n in SIX),
        ],
        SIX,
        "in folders of column 'split'",
    ),
    "without extension": Layout(
        [f"train/ROCO_{n}.png" for n in SIX],
        [["ID", "Caption"], *([f"ROCO_{n}", f"this is {n}"] for n in SIX)],
        SIX,
        "images in {root}/train",
        column="ID",
    ),
    "other case": Layout([f"img/IMG_{n}.PNG" for n in SIX], rows_of([f"img/img_{n}.png" for n in SIX]), SIX),
    "other spelling of the extension": Layout([f"{n}.jpeg" for n in SIX], rows_of([f"{n}.JPG" for n in SIX]), SIX),
    "two folders deep": Layout(
        [f"images/train2017/{n}.png" for n in SIX],
        rows_of([f"{n}.png" for n in SIX]),
        SIX,
        "images in {root}/images/train2017",
        "annotations/t.csv",
    ),
    "several spellings": Layout(
        ["a.png", "A.PNG", "b.png"],
        [["image", "caption"], ["b.png", "this is 2"], ["a.Png", "this is 0"]],
        [2],
        left_out={"the path fits several files": 1},
    ),
    "most are missing in a folder beside": Layout(
        [f"other/{n}.png" for n in range(2)],
        rows_of([f"{n}.png" for n in SIX]),
        [],
        left_out={"a file cannot be read": 6},
    ),
}


def write(root: Path, layout: Layout) -> Path:
    """The images and the table of a layout."""
    for number, name in enumerate(layout.disk):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(image(number))
    table = root / layout.table
    table.parent.mkdir(parents=True, exist_ok=True)
    with table.open("w", newline="") as file:
        csv.writer(file).writerows(layout.rows)
    return table


@pytest.mark.parametrize("kind", LAYOUTS)
def test_each_row_gets_its_own_image(kind: str, tmp_path: Path) -> None:
    """Images in folders that a column names, without extension or in another case are found; where several files may
    be meant, none is used. What was recognised is said."""
    layout, root = LAYOUTS[kind], tmp_path / "data"
    records = open_records(write(root, layout), layout.column)
    packed = pack(records, tmp_path / "out", threads=1)
    shards = [str(path) for path in packed.shards["train"]]
    found = {sample.image: sample.fields["txt"] for sample in iter_samples(shards)}
    assert found == {image(n): f"this is {n}" for n in layout.used}
    assert {cause: o.pairs for cause, o in packed.account.left_out.items()} == (layout.left_out or {})
    assert layout.says.format(root=root) in records.describe()


@pytest.mark.parametrize("kind", ["karpathy", "two folders deep", "other case"])
def test_images_that_rows_name_in_other_words_are_not_counted_twice(kind: str, tmp_path: Path) -> None:
    """A folder with its table counts each image once, also where the table spells its path otherwise."""
    write(tmp_path / "data", LAYOUTS[kind])
    packed = pack(open_records(tmp_path / "data"), tmp_path / "out", threads=1)
    assert packed.account.summary() == "6 pairs offered = 6 used + 0 left out"


def test_another_dataset_beside_is_not_taken(tmp_path: Path) -> None:
    """Images of equal names in a folder elsewhere that have captions of their own are not those of the table."""
    for number in SIX:
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other" / f"{number}.png").write_bytes(image(number))
        (tmp_path / "other" / f"{number}.txt").write_text("of another dataset")
    table = write(tmp_path / "data", Layout([], rows_of([f"{n}.png" for n in SIX]), []))
    packed = pack(open_records(table), tmp_path / "out", threads=1)
    assert packed.account.summary() == "6 pairs offered = 0 used + 6 left out (a file cannot be read: 6)"
