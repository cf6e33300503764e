"""Folders as people have them: every image with a caption is packed rightly, or counted and named."""

import gzip
import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from mmssl.data import Account, iter_samples
from mmssl.data.packing.folders import FolderRecords, holds_pairs
from mmssl.data.packing.packer import Packed, pack
from mmssl.data.packing.tables import open_records
from mmssl.errors import UserError
from tests.helpers.images import encode
from tests.helpers.tars import pair, tar_bytes


def image(number: int, format: str = "PNG") -> bytes:
    """A small image unlike the others."""
    return encode(Image.new("RGB", (16, 12), (number * 20 % 256, 99, 255 - number * 20 % 256)), format)


def put(root: Path, name: str, number: int = 0, caption: str | None = None, format: str = "PNG") -> None:
    """An image with its caption beside it."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image(number, format))
    path.with_suffix(".txt").write_text(caption or f"caption {number}", encoding="utf-8")


def captions(packed: Packed) -> dict[bytes, str]:
    """Image -> caption of all packed samples."""
    shards = [str(path) for paths in packed.shards.values() for path in paths]
    return {sample.image: sample.fields["txt"] for sample in iter_samples(shards)}


def packed_folder(root: Path, out: Path) -> tuple[dict[bytes, str], Account]:
    """The pairs of a packed folder, and the account."""
    packed = pack(FolderRecords(root), out, threads=1)
    return captions(packed), packed.account


FORMATS = {
    "jpg": "JPEG",
    "JPEG": "JPEG",
    "jfif": "JPEG",
    "jpe": "JPEG",
    "Png": "PNG",
    "apng": "PNG",
    "webp": "WEBP",
    "avif": "AVIF",
    "gif": "GIF",
    "bmp": "BMP",
    "tif": "TIFF",
    "TIFF": "TIFF",
    "jp2": "JPEG2000",
    "ppm": "PPM",
    "pnm": "PPM",
    "qoi": "QOI",
}


def test_every_format_that_pillow_decodes_is_packed(tmp_path: Path) -> None:
    """Whatever the extension and its case, the bytes of the image and its caption arrive, and are read again."""
    for number, (extension, format) in enumerate(FORMATS.items()):
        put(tmp_path / "in", f"a{number}.{extension}", number, format=format)
    found, account = packed_folder(tmp_path / "in", tmp_path / "out")
    assert found == {image(n, format): f"caption {n}" for n, format in enumerate(FORMATS.values())}
    assert account.summary() == f"{len(FORMATS)} pairs offered = {len(FORMATS)} used + 0 left out"


@pytest.mark.parametrize("extension", ["heic", "HEIF", "svg", "dcm", "jxl", "cr2", "xyz"])
def test_other_formats_are_counted_with_a_remedy(tmp_path: Path, extension: str) -> None:
    """A file with a caption beside it that is no readable image is left out by its extension, with what to do."""
    put(tmp_path / "in", "good.png", 1)
    for number in range(3):
        put(tmp_path / "in", f"sub/x{number}.{extension}")
    found, account = packed_folder(tmp_path / "in", tmp_path / "out")
    assert found == {image(1): "caption 1"}
    (omission,) = account.left_out.values()
    assert (account.offered, omission.pairs) == (4, 3)
    assert "convert them to JPEG or PNG" in omission.remedy
    assert any(f".{extension.lower()}" in cause for cause in account.left_out)


def test_an_image_of_another_kind_under_a_known_name_is_named(tmp_path: Path) -> None:
    """An SVG or a HEIC file that is called .jpg is left out by its kind, not as broken."""
    put(tmp_path / "in", "good.png", 1)
    for name, content in (("a.jpg", b"<svg xmlns='http://www.w3.org/2000/svg'/>"), ("b.jpg", b"\0\0\0\x18ftypheic")):
        put(tmp_path / "in", name)
        (tmp_path / "in" / name).write_bytes(content.ljust(64, b"\0"))
    _, account = packed_folder(tmp_path / "in", tmp_path / "out")
    assert set(account.left_out) == {"the image is SVG", "the image is HEIC"}
    assert all("convert" in omission.remedy for omission in account.left_out.values())


def test_linked_folders_are_followed_and_circles_end(tmp_path: Path) -> None:
    """Images in a linked folder count once, whichever way leads to them; a link that leads nowhere is named."""
    root = tmp_path / "in"
    put(root, "a/1.png", 1)
    put(tmp_path / "elsewhere", "sub/2.png", 2)
    put(tmp_path / "store", "3.png", 3)
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "again").symlink_to(root / "a")
    (root / "a" / "circle").symlink_to(root)
    (tmp_path / "elsewhere" / "back").symlink_to(root)
    (root / "3.png").symlink_to(tmp_path / "store" / "3.png")
    (root / "3.txt").symlink_to(tmp_path / "store" / "3.txt")
    (root / "gone.jpg").symlink_to(tmp_path / "gone.jpg")
    found, account = packed_folder(root, tmp_path / "out")
    assert found == {image(n): f"caption {n}" for n in (1, 2, 3)}
    assert list(account.left_out) == ["the link leads to no file"]
    assert "gone.jpg" in account.left_out["the link leads to no file"].example


def test_files_of_desktops_do_not_count_but_hidden_pairs_do(tmp_path: Path) -> None:
    """AppleDouble files, Thumbs.db and folders of file managers are ignored; an image hidden by a dot is named."""
    root = tmp_path / "in"
    put(root, "1.png", 1)
    for name in ("._1.png", "._1.txt", ".DS_Store", "Thumbs.db", "desktop.ini", "README.txt", "notes.pdf"):
        (root / name).write_bytes(b"\0\5\x16\7")
    put(root, "__MACOSX/1.png", 7)
    put(root, "@eaDir/1.png", 8)
    put(root, ".thumbnails/1.png", 9)
    put(root, ".secret.png", 2)
    put(root, ".folder/3.png", 3)
    (root / ".alone.png").write_bytes(image(4))
    found, account = packed_folder(root, tmp_path / "out")
    assert found == {image(1): "caption 1"}
    assert {cause: o.pairs for cause, o in account.left_out.items()} == {"the file or its folder is hidden": 2}


@pytest.mark.parametrize("count", [1, 3])
def test_shards_among_images_are_named_with_their_pairs(tmp_path: Path, count: int) -> None:
    """Each pair of a tar in the folder counts as left out, with the command that packs it; so does a packed tar."""
    root = tmp_path / "in"
    for number in range(5):
        put(root, f"{number}.png", number)
    for number in range(count):
        (root / f"backup{number}.tar").write_bytes(tar_bytes(f for i in range(12) for f in pair(f"{number}-{i}")))
    (root / "more.tar.gz").write_bytes(b"\x1f\x8b")
    found, account = packed_folder(root, tmp_path / "out")
    assert len(found) == 5
    assert account.left_out["a shard lies among the images"].pairs == 12 * count + 1
    assert "mmssl shards pack" in account.left_out["a shard lies among the images"].remedy


def test_shards_packed_into_their_own_source_are_no_pairs_of_it(tmp_path: Path) -> None:
    """Packing again with the shards below the folder of images finds the same pairs."""
    for number in range(4):
        put(tmp_path, f"{number}.png", number)
    first = pack(FolderRecords(tmp_path), tmp_path / "shards", threads=1)
    again = pack(FolderRecords(tmp_path), tmp_path / "shards", threads=1)
    assert first.account.summary() == again.account.summary() == "4 pairs offered = 4 used + 0 left out"


@pytest.mark.parametrize(
    "names",
    [
        ["v1.0.png", "v1_0.png"],
        ["x/a.b.png", "x/a_b.png", "x.a/b.png", "x_a/b.png"],
        ["a.b.png", "a_b.jpg", "a_b_2.webp"],
    ],
)
def test_names_that_make_one_key_are_all_packed(tmp_path: Path, names: list[str]) -> None:
    """Dots that fall away in keys lose no image."""
    for number, name in enumerate(names):
        put(tmp_path / "in", name, number)
    records = FolderRecords(tmp_path / "in")
    assert len(set(records.keys())) == len(names)
    packed = pack(records, tmp_path / "out", splits={"train": 0.5, "val": 0.5})
    assert {*captions(packed)} == {image(number) for number in range(len(names))}


def test_captions_are_found_in_any_case_and_kind(tmp_path: Path) -> None:
    """NAME.TXT, NAME.caption and NAME.JSON are captions; a text without image and an image without text are named."""
    root = tmp_path / "in"
    root.mkdir()
    for number, (name, text) in enumerate(
        [("a.TXT", "one"), ("b.caption", "two"), ("c.JSON", json.dumps({"caption": "three"})), ("d.Txt", "four")]
    ):
        (root / f"{name[0]}.png").write_bytes(image(number))
        (root / name).write_text(text)
    (root / "bare.png").write_bytes(image(9))
    (root / "lonely.txt").write_text("a caption")
    found, account = packed_folder(root, tmp_path / "out")
    assert found == {image(n): text for n, text in enumerate(("one", "two", "three", "four"))}
    assert {cause: o.pairs for cause, o in account.left_out.items()} == {
        "no caption": 1,
        "no image beside the caption": 1,
    }


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What may hold pairs and cannot be listed is no silent loss."""
    put(tmp_path / "in", "1.png", 1)
    put(tmp_path / "in", "closed/2.png", 2)
    scan = os.scandir

    def refuse(path: Path) -> "os._ScandirIterator[str]":
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied")
        return scan(str(path))

    monkeypatch.setattr("mmssl.data.packing.folders.os.scandir", refuse)
    _, account = packed_folder(tmp_path / "in", tmp_path / "out")
    assert {cause: o.pairs for cause, o in account.left_out.items()} == {"a folder cannot be read": 1}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_pipes_and_devices_are_not_read(tmp_path: Path) -> None:
    """What would block for ever, or never end, is left out as a file that cannot be read."""
    put(tmp_path / "in", "1.png", 1)
    put(tmp_path / "in", "2.png", 2)
    put(tmp_path / "in", "3.png", 3)
    for name in ("2.png", "3.txt"):
        (tmp_path / "in" / name).unlink()
        os.mkfifo(tmp_path / "in" / name)
    found, account = packed_folder(tmp_path / "in", tmp_path / "out")
    assert found == {image(1): "caption 1"}
    assert {cause: o.pairs for cause, o in account.left_out.items()} == {"a file cannot be read": 2}
    (tmp_path / "t.csv").write_text("image,caption\nin/1.png,a one\n/dev/zero,a zero\nin/2.png,a two\n")
    account = pack(open_records(tmp_path / "t.csv"), tmp_path / "table", threads=1).account
    assert account.summary() == "3 pairs offered = 1 used + 2 left out (a file cannot be read: 2)"


@pytest.mark.parametrize("change", ["caption mended", "caption emptied", "image replaced", "caption added"])
def test_packing_again_notices_changes(tmp_path: Path, change: str) -> None:
    """Images or captions that changed since are not taken for packed: the message says what to do."""
    root = tmp_path / "in"
    for number in range(6):
        put(root, f"{number}.png", number)
    (root / "3.txt").unlink()
    pack(FolderRecords(root), tmp_path / "out", threads=1)
    pack(FolderRecords(root), tmp_path / "out", threads=1)
    if change == "image replaced":
        (root / "1.png").write_bytes(image(11))
    elif change == "caption added":
        (root / "3.txt").write_text("now there is one")
    else:
        (root / "1.txt").write_text("" if change == "caption emptied" else "better")
    with pytest.raises(UserError, match=r"images or captions changed since; choose another folder, or remove"):
        pack(FolderRecords(root), tmp_path / "out", threads=1)


def test_a_restored_file_of_a_table_is_packed_by_the_next_call(tmp_path: Path) -> None:
    """Rows left out for a missing image are packed once the image is back; the account follows."""
    (tmp_path / "t.csv").write_text("image,caption\n" + "".join(f"{i}.png,caption {i}\n" for i in range(6)))
    for number in range(0, 6, 2):
        (tmp_path / f"{number}.png").write_bytes(image(number))
    first = pack(open_records(tmp_path / "t.csv"), tmp_path / "out", shard_samples=2)
    assert (first.account.used, first.account.omitted) == (3, 3)
    for number in (1, 3):
        (tmp_path / f"{number}.png").write_bytes(image(number))
    again = pack(open_records(tmp_path / "t.csv"), tmp_path / "out", shard_samples=2)
    assert (again.account.used, again.account.omitted) == (5, 1)
    assert captions(again) == {image(n): f"caption {n}" for n in (0, 1, 2, 3, 4)}


def test_a_folder_without_a_usable_image_says_what_it_holds(tmp_path: Path) -> None:
    """Ten HEIC files with captions are not "no images": they are counted, with the remedy."""
    for number in range(10):
        put(tmp_path, f"{number}.heic")
    with pytest.raises(UserError, match=r"contains no images.*10 left out: \.heic files.*convert them"):
        FolderRecords(tmp_path)


JOINED = {
    "name of the whole file": ("a.png", "a.png.txt"),
    "json with the name of the whole file": ("a.png", "a.png.json"),
    "other case": ("IMG_1.PNG", "img_1.TXT"),
    "decomposed accents": ("cafe\u0301.png", "caf\xe9.txt"),
    "composed accents": ("caf\xe9.png", "cafe\u0301.caption"),
    "alone in its folder": ("image.png", "caption.txt"),
    "prompt": ("output.png", "Prompt.txt"),
}


@pytest.mark.parametrize("kind", JOINED)
def test_a_caption_of_another_spelling_is_found(tmp_path: Path, kind: str) -> None:
    """Names that differ in case, in the form of accents or by a double extension belong together, if only one can."""
    for number in (1, 2):
        name, text = JOINED[kind]
        (tmp_path / "in" / f"{number}").mkdir(parents=True)
        (tmp_path / "in" / f"{number}" / name).write_bytes(image(number))
        caption = json.dumps({"text": f"caption {number}"}) if text.endswith("json") else f"caption {number}"
        (tmp_path / "in" / f"{number}" / text).write_text(caption)
    found, account = packed_folder(tmp_path / "in", tmp_path / "out")
    assert found == {image(n): f"caption {n}" for n in (1, 2)}
    assert account.summary() == "2 pairs offered = 2 used + 0 left out"


APART = {
    "two folders": {"images/{}.png": "captions/{}.txt"},
    "splits in both": {"images/train/{}.png": "texts/train/{}.txt", "images/val/{}.png": "texts/val/{}.txt"},
    "JSON": {"images/{}.png": "annotations/{}.json"},
    "boxes": {"images/{}.png": "labels/{}.txt"},
}


@pytest.mark.parametrize("kind", APART)
def test_captions_in_a_folder_of_their_own_are_found(tmp_path: Path, kind: str) -> None:
    """`images/1.png` has its caption in `captions/1.txt`, also within folders of splits; boxes are no captions."""
    expected = {}
    for place, (name, text) in enumerate(APART[kind].items()):
        for number in range(3):
            caption = f"0 0.5 0.{number}" if kind == "boxes" else f"caption {number} of {place}"
            content = json.dumps({"caption": caption}) if text.endswith("json") else caption
            for path, data in ((name, image(3 * place + number)), (text, content.encode())):
                (tmp_path / "in" / path.format(number)).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / "in" / path.format(number)).write_bytes(data)
            expected[image(3 * place + number)] = caption
    packed = pack(open_records(tmp_path / "in"), tmp_path / "out", threads=1)
    if kind == "boxes":
        assert packed.account.summary() == "3 pairs offered = 0 used + 3 left out (no caption: 3)"
    else:
        assert captions(packed) == expected
        assert packed.account.omitted == 0
        before = open_records(tmp_path / "in").identity()
        text = next((tmp_path / "in").rglob("1.txt"), None) or next((tmp_path / "in").rglob("1.json"))
        text.write_text(text.read_text() + " ")
        assert open_records(tmp_path / "in").identity() != before


def test_the_fields_of_a_json_without_caption_are_named(tmp_path: Path) -> None:
    """The reason tells the fields that the .json has, so that nobody looks for a missing file."""
    put(tmp_path / "in", "good.png", 1)
    (tmp_path / "in" / "a.png").write_bytes(image(2))
    (tmp_path / "in" / "a.json").write_text('{"label": "cat", "n": 1}')
    _, account = packed_folder(tmp_path / "in", tmp_path / "out")
    assert "a.json has label, n, none of caption, text" in account.left_out["no caption"].example


def test_names_that_a_tar_reader_refuses_are_packed(tmp_path: Path) -> None:
    """Line breaks and control characters in names lose no pair: each packed sample is one that the index has."""
    for number, name in enumerate(["new\nline", "cr\rx", "tab\tx", "-rf", "a..b", "*", "{0..3}", "q'\"", " x "]):
        put(tmp_path / "in", f"{name}.png", number)
    found, account = packed_folder(tmp_path / "in", tmp_path / "out")
    assert found == {image(number): f"caption {number}" for number in range(9)}
    assert account.summary() == "9 pairs offered = 9 used + 0 left out"


@pytest.mark.parametrize(
    ("files", "used"),
    [
        (["a.png", "A.png", "a.txt"], 1),
        (["a.png", "a.txt", "A.txt"], 1),
        (["Ab.png", "aB.png", "ab.txt"], 0),
        (["1.png", "2.png", "caption.txt"], 0),
        (["1.png", "notes.txt"], 0),
        (["a.png", "a.txt", "a.png.txt"], 1),
    ],
)
def test_nothing_is_joined_where_there_is_a_choice(tmp_path: Path, files: list[str], used: int) -> None:
    """A caption that might belong to two images, or whose name tells nothing, is used for none."""
    for number, name in enumerate(files):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(image(number) if name.endswith("png") else name.encode())
    found, account = packed_folder(tmp_path / "in", tmp_path / "out")
    assert list(found.values()) == ["a.txt"] * used
    assert account.omitted == len(files) - 2 * used


TABLE = "image,caption\n" + "".join(f"{n}.png,caption {n}\n" for n in range(4))
OTHER = "file,words,title\n" + "".join(f"{n}.png,x,caption {n}\n" for n in range(4))


def bare(root: Path, numbers: Sequence[int]) -> None:
    """Images without captions."""
    root.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        (root / f"{number}.png").write_bytes(image(number))


@pytest.mark.parametrize("place", ["", "images", "deep/er"])
@pytest.mark.parametrize("name", ["captions.csv", "captions.txt", "labels.jsonl"])
def test_a_table_among_images_without_captions_is_read(tmp_path: Path, place: str, name: str) -> None:
    """A folder of images with one table of their captions is that table; images that it does not name are counted."""
    bare(tmp_path / "in" / place, range(5))
    lines = [{"image": f"{n}.png", "caption": f"caption {n}"} for n in range(4)]
    content = "\n".join(map(json.dumps, lines)) if name.endswith("jsonl") else TABLE
    (tmp_path / "in" / place / name).write_text(content)
    records = open_records(tmp_path / "in")
    packed = pack(records, tmp_path / "out", threads=1)
    assert captions(packed) == {image(n): f"caption {n}" for n in range(4)}
    assert packed.account.summary() == (
        "5 pairs offered = 4 used + 1 left out (no row of the table names the image: 1)"
    )
    assert "image column 'image'" in records.describe()


def test_tables_of_one_kind_are_one_and_others_are_refused(tmp_path: Path) -> None:
    """Parts of a table in one folder are read as one; tables of different columns are a choice of the user."""
    bare(tmp_path / "in", range(8))
    (tmp_path / "in" / "part-0.csv").write_text(TABLE)
    rows = "".join(f"{n}.png,caption {n}\n" for n in range(4, 8))
    (tmp_path / "in" / "part-1.csv").write_text("image,caption\n" + rows)
    packed = pack(open_records(tmp_path / "in"), tmp_path / "out", threads=1)
    assert captions(packed) == {image(n): f"caption {n}" for n in range(8)}
    (tmp_path / "in" / "other.csv").write_text(OTHER.replace("file,", "path,"))
    with pytest.raises(UserError, match=r"several tables of different columns; name one: .*other\.csv, .*part-0\.csv"):
        open_records(tmp_path / "in")


def test_a_table_among_pairs_is_counted(tmp_path: Path) -> None:
    """Rows of a table beside images that have captions of their own are left out one by one; a table without images
    is no matter; two descriptions of the same images are refused."""
    for number in range(3):
        put(tmp_path / "in", f"{number}.png", number)
    (tmp_path / "in" / "more.csv").write_text(TABLE)
    (tmp_path / "in" / "sizes.csv").write_text("width,height\n1,2\n")
    found = pack(open_records(tmp_path / "in"), tmp_path / "out", threads=1)
    assert captions(found) == {image(n): f"caption {n}" for n in range(3)}
    assert found.account.summary() == (
        "7 pairs offered = 3 used + 4 left out (a table lies among images with captions: 4)"
    )
    (tmp_path / "in" / "metadata.csv").write_text(TABLE.replace("image,", "file_name,"))
    with pytest.raises(UserError, match=r"describes its images twice, in metadata\.csv and .*0\.txt; give the table"):
        open_records(tmp_path / "in")


def test_a_packed_folder_is_packed_again_by_itself_and_ignored_beside_its_images(tmp_path: Path) -> None:
    """Shards that were packed into the folder of their images are no further pairs; alone they are."""
    for number in range(3):
        put(tmp_path / "in", f"{number}.png", number)
    for out in ("in/packed", "in", "alone"):
        found = pack(open_records(tmp_path / "in"), tmp_path / out, threads=1)
        assert found.account.summary() == "3 pairs offered = 3 used + 0 left out"
    again = pack(open_records(tmp_path / "alone"), tmp_path / "again", threads=1)
    assert captions(again) == {image(n): f"caption {n}" for n in range(3)}
    assert again.account.summary() == "3 pairs offered = 3 used + 0 left out"


def test_shards_are_found_below_a_folder_and_images_beside_them_are_counted(tmp_path: Path) -> None:
    """Shards in folders within a folder, in any case of their extension, are packed; bare images there are counted."""
    bare(tmp_path / "in", [9])
    for number, name in enumerate(["a/0.tar", "b/1.TAR", "2.tar.gz"]):
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        files = [(f"{number}.png", image(number)), (f"{number}.txt", f"caption {number}".encode())]
        content = tar_bytes(files)
        (tmp_path / "in" / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    packed = pack(open_records(tmp_path / "in"), tmp_path / "out", threads=1)
    assert captions(packed) == {image(n): f"caption {n}" for n in range(2)}
    assert packed.account.summary() == (
        "3 pairs offered = 2 used + 1 left out (shards lie beside the image, which has no caption: 1); besides, an "
        "unknown number is lost (a shard is damaged: 1)"
    )
    assert "gzip" in packed.account.left_out["a shard is damaged"].example


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_tells_the_encoding(tmp_path: Path, encoding: str) -> None:
    """Captions that Windows programs save with a mark are read."""
    put(tmp_path / "in", "1.png", 1)
    (tmp_path / "in" / "1.txt").write_bytes("café 東".encode(encoding))
    assert packed_folder(tmp_path / "in", tmp_path / "out")[0] == {image(1): "café 東"}


def test_null_characters_are_no_caption(tmp_path: Path) -> None:
    """UTF-16 without a mark is valid UTF-8 with null characters: it is left out, not used with them."""
    put(tmp_path / "in", "1.png", 1)
    put(tmp_path / "in", "2.png", 2)
    (tmp_path / "in" / "1.txt").write_bytes("a cat".encode("utf-16-le"))
    found, account = packed_folder(tmp_path / "in", tmp_path / "out")
    assert found == {image(2): "caption 2"}
    (omission,) = account.left_out.values()
    assert "iconv" in omission.remedy


@pytest.mark.parametrize(
    ("files", "holds"),
    [(["a.png", "a.txt"], True), (["a.png"], False), (["a.txt", "b.tar"], False), (["A.JPG", "A.JSON"], True)],
)
def test_pairs_in_a_folder_are_seen(tmp_path: Path, files: list[str], holds: bool) -> None:
    """Only an image with a caption of its name makes a folder one of images."""
    for name in files:
        (tmp_path / name).write_bytes(b"x")
    assert holds_pairs(tmp_path) is holds
