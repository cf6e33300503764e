"""Sheets of samples and single samples."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmssl.data.health.browse import SheetEntry, contact_sheet, describe, entries, find, pick
from mmssl.errors import UserError
from mmssl.types import Sample
from tests.helpers.images import encode, orientation, photo
from tests.helpers.tars import tar_bytes, write_shards


def test_pick_is_even_and_fixed(tmp_path: Path) -> None:
    """Every sample is picked at the same rate, in file order; a seed fixes the choice."""
    shards = write_shards(tmp_path, [7, 3, 10])
    counts = np.zeros(20)
    for seed in range(300):
        chosen = [sample.id for sample in pick(shards, 5, seed)]
        assert chosen == sorted(set(chosen))
        counts[chosen] += 1
    assert counts.sum() == 1500
    assert 45 < counts.min() <= counts.max() < 110
    assert [s.key for s in pick(shards, 5, 3)] == [s.key for s in pick(shards, 5, 3)]
    assert len(pick(shards, 100)) == 20


def test_find_by_key(tmp_path: Path) -> None:
    """A sample is found by its key, or by shard and key where shards share keys; a missing one is explained."""
    for name, text in (("a.tar", b"first"), ("b.tar", b"second")):
        (tmp_path / name).write_bytes(tar_bytes([("x/y.jpg", b"."), ("x/y.txt", text)]))
    shards = [str(tmp_path / "a.tar"), str(tmp_path / "b.tar")]
    assert find(shards, "x/y").fields["txt"] == "first"
    assert find(shards, f"{shards[1]}:x/y").fields["txt"] == "second"
    with pytest.raises(UserError, match=r"no sample 'z' in .*a.tar and 1 more; keys look like 'x/y'"):
        find(shards, "z")


def test_describe_names_everything() -> None:
    """The text has key, format, displayed size, orientation and all fields, or why the image is broken."""
    image = encode(photo(80, 120), "JPEG", exif=orientation(6))
    text = describe(Sample(0, "a.tar", "k", image, {"txt": "a fox", "tags": ["x", "ü"]}))
    for part in ("a.tar:k", "JPEG, 80 x 120 pixels", "EXIF orientation 6", 'txt: "a fox"', 'tags: ["x", "ü"]'):
        assert part in text
    assert "not a JPEG" in describe(Sample(0, "a.tar", "k", b"junk", {}))


def test_sheet_holds_every_image() -> None:
    """Images stand row by row in their squares, in their own shape; a broken one is a red frame."""
    red, green = (
        encode(Image.new("RGB", (40, 20), "red"), "PNG"),
        encode(Image.new("RGB", (20, 40), (0, 200, 0)), "PNG"),
    )
    samples = [
        Sample(i, "a.tar", str(i), image, {"txt": "x " * 300}) for i, image in enumerate([red, green, b"junk", red])
    ]
    sheet = np.asarray(contact_sheet(entries(samples), columns=3, side=60))

    def square(row: int, column: int) -> np.ndarray:
        height = (sheet.shape[0] - 8) // 2
        return sheet[8 + row * height : 68 + row * height, 8 + column * 68 : 68 + column * 68]

    assert (square(0, 0)[15:45] == [255, 0, 0]).all()
    assert (square(0, 0)[:14] == 255).all()
    assert (square(0, 1)[:, 15:45] == [0, 200, 0]).all()
    assert (square(0, 2)[0] == [255, 0, 0]).all()
    assert (square(0, 2)[1:-1, 1:-1] == 255).all()
    assert (square(1, 0)[15:45] == [255, 0, 0]).all()
    below = sheet[68 : 8 + (sheet.shape[0] - 8) // 2, :68]
    assert (below < 128).any(), "the caption is written below the image"


def test_entries_show_what_is_wrong() -> None:
    """A broken image or a missing field becomes an entry with the error."""
    image = encode(photo(20, 20), "PNG")
    samples = [Sample(0, "a.tar", "k0", b"junk", {"txt": "x"}), Sample(1, "a.tar", "k1", image, {"title": "x"})]
    first, second = entries(samples)
    assert first.pixels is None
    assert first.caption.startswith("k0: not a JPEG")
    assert second.pixels is None
    assert "'txt'" in second.caption


def test_empty_sheet() -> None:
    """Without entries the sheet is blank; any script can be a caption."""
    assert (np.asarray(contact_sheet([])) == 255).all()
    contact_sheet([SheetEntry(None, "日本語 $x$ \n\n ü 🦊")], columns=1)
