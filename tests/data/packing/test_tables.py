"""Tables as people have them: every row is a pair with the right caption, or is counted with its cause."""

import base64
import bz2
import csv
import gzip
import io
import json
import lzma
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmssl.data.packing.records import RecordError
from mmssl.data.packing.tables import open_records
from mmssl.data.transforms.captions import every_caption
from mmssl.errors import UserError
from tests.helpers.images import encode

COUNT = 12
CAPTIONS = [f"a thing of number {i} on a table" for i in range(COUNT)]
ROWS = [(f"img/p{i}.png", caption) for i, caption in enumerate(CAPTIONS)]
Pairs = dict[int, list[str]]
"""Number of the image -> its captions."""


def image(number: int) -> bytes:
    """A small image unlike the others."""
    return encode(Image.new("RGB", (12, 10), (number * 20, 99, 255 - number * 20)), "PNG")


NUMBERS = {image(i): i for i in range(COUNT)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the images p0.png ... p11.png in img/."""
    (tmp_path / "img").mkdir()
    for i in range(COUNT):
        (tmp_path / "img" / f"p{i}.png").write_bytes(image(i))
    return tmp_path


def outcome(source: Path, **options: Any) -> tuple[Pairs, Counter[str]]:
    """The pairs of a source, and the causes for which the others are left out."""
    records = open_records(source, **options)
    pairs: Pairs = {}
    causes = Counter(error.cause for _, error in records.defects())
    keys = records.keys()
    assert len(set(keys)) == len(keys) == len(records.owners())
    for number in range(len(keys)):
        try:
            (content,), fields = records.load(number)
        except RecordError as error:
            causes[error.cause] += 1
        else:
            several = next((v for v in fields.values() if isinstance(v, list) and v[:1] == [fields["txt"]]), None)
            pairs.setdefault(NUMBERS[content], []).extend(several or [fields["txt"]])
    return pairs, causes


def lines(
    separator: str, names: Sequence[str] = ("image", "caption"), end: str = "\n", rows: Sequence[Any] = ROWS
) -> str:
    """A table without quotes."""
    return "".join(separator.join(row) + end for row in ([names] if names else []) + list(rows))


def quoted(rows: Sequence[Sequence[str]], **options: Any) -> str:
    """A table as Python's csv writes it."""
    file = io.StringIO()
    csv.writer(file, **options).writerows([("image", "caption"), *rows])
    return file.getvalue()


def with_captions(captions: Sequence[str]) -> list[tuple[str, str]]:
    return [(path, caption) for (path, _), caption in zip(ROWS, captions, strict=True)]


WESTERN = [f"{caption}, café crème, naïve" for caption in CAPTIONS]
CHINESE = [f"{caption} 一只红色的猫在桌子上" for caption in CAPTIONS]
RUSSIAN = [f"{caption} красная лиса в лесу" for caption in CAPTIONS]
COMMAS = [f"{caption}, with a comma, and another" for caption in CAPTIONS]
QUOTES = [f'"{caption}" it says' if i % 3 == 0 else f'a 12" {caption}' for i, caption in enumerate(CAPTIONS)]
LONG = [f"{caption} {'word ' * 40_000}".strip() if i == 5 else caption for i, caption in enumerate(CAPTIONS)]
NEWLINES = [f'{caption}\nsecond line, with "quotes"' for caption in CAPTIONS]
SWALLOW = [
    '"Hello world of pizza' if i == 3 else 'a pizza of 12"' if i == 7 else caption for i, caption in enumerate(CAPTIONS)
]
HTML = [f"{caption} &amp; <b>more</b>; and | so on" for caption in CAPTIONS]

WHOLE: dict[str, tuple[str, str | bytes, list[str]]] = {
    "comma": ("t.csv", lines(","), CAPTIONS),
    "tab in csv": ("t.csv", lines("\t", ("filepath", "title")), CAPTIONS),
    "semicolon": ("t.csv", lines(";", ("file_name", "text")), CAPTIONS),
    "pipe with spaces": ("t.csv", lines("| ", ("image_name", " comment")), CAPTIONS),
    "tsv": ("t.tsv", lines("\t", ("caption", "image"), rows=[(c, p) for p, c in ROWS]), CAPTIONS),
    "comma in tsv": ("t.tsv", lines(","), CAPTIONS),
    "tab file": ("t.tab", lines("\t"), CAPTIONS),
    "txt": ("captions.txt", lines(","), CAPTIONS),
    "upper-case suffix": ("T.CSV", lines(","), CAPTIONS),
    "crlf": ("t.csv", lines(",", end="\r\n"), CAPTIONS),
    "cr": ("t.csv", lines(",", end="\r"), CAPTIONS),
    "bom": ("t.csv", lines(",").encode("utf-8-sig"), CAPTIONS),
    "utf-16": ("t.csv", lines("\t", rows=with_captions(CHINESE)).encode("utf-16"), CHINESE),
    "utf-16-be": ("t.csv", b"\xfe\xff" + lines(",").encode("utf-16-be"), CAPTIONS),
    "utf-16-le without bom": ("t.csv", lines(",").encode("utf-16-le"), CAPTIONS),
    "utf-32": ("t.csv", lines(";").encode("utf-32"), CAPTIONS),
    "cp1252": ("t.csv", lines(";", rows=with_captions(WESTERN)).encode("cp1252"), WESTERN),
    "latin-1, one letter": (
        "t.csv",
        lines(",", rows=with_captions([*CAPTIONS[:-1], "caf\xe9"])).encode("latin-1"),
        [*CAPTIONS[:-1], "café"],
    ),
    "cp1251": ("t.csv", lines(";", rows=with_captions(RUSSIAN)).encode("cp1251"), RUSSIAN),
    "gb18030": ("t.csv", lines(",", rows=with_captions(CHINESE)).encode("gb18030"), CHINESE),
    "gz": ("t.csv.gz", gzip.compress(lines(",").encode()), CAPTIONS),
    "tsv gz": ("t.tsv.gz", gzip.compress(lines("\t").encode()), CAPTIONS),
    "bz2": ("t.csv.bz2", bz2.compress(lines(",").encode()), CAPTIONS),
    "xz": ("t.CSV.XZ", lzma.compress(lines(",").encode()), CAPTIONS),
    "other case and spaces": ("t.csv", lines(",", ("Image Path", " Caption ")), CAPTIONS),
    "upper case": ("t.csv", lines(",", ("IMAGE", "TEXT")), CAPTIONS),
    "no header": ("t.csv", lines(",", ()), CAPTIONS),
    "no header, tab": ("t.txt", lines("\t", (), rows=[(f"{p}#{i}", c) for i, (p, c) in enumerate(ROWS)]), CAPTIONS),
    "no header, caption first": ("t.csv", lines("\t", (), rows=[(c, p) for p, c in ROWS]), CAPTIONS),
    "unnamed index": (
        "t.csv",
        lines(",", ("", "filepath", "title"), rows=[(str(i), *r) for i, r in enumerate(ROWS)]),
        CAPTIONS,
    ),
    "index without a name at all": ("t.csv", lines(",", rows=[(str(i + 1), *r) for i, r in enumerate(ROWS)]), CAPTIONS),
    "same name twice": ("t.csv", lines(",", ("image", "image", "caption"), rows=[("x", *r) for r in ROWS]), CAPTIONS),
    "long field": ("t.csv", lines(",", rows=with_captions(LONG)), LONG),
    "blank lines": ("t.csv", lines(",").replace("\n", "\n\n"), CAPTIONS),
    "rows of separators alone": ("t.csv", lines(",") + ",\n,\n", CAPTIONS),
    "quoted": ("t.csv", quoted(with_captions(COMMAS)), COMMAS),
    "all quoted": ("t.csv", quoted(ROWS, quoting=csv.QUOTE_ALL), CAPTIONS),
    "all quoted tsv": ("t.tsv", quoted(with_captions(QUOTES), quoting=csv.QUOTE_ALL, delimiter="\t"), QUOTES),
    "space before a quote": ("t.csv", quoted(with_captions(COMMAS)).replace(',"', ', "'), COMMAS),
    "comments before the header": ("t.csv", f"# exported today\n\n# by a program\n{lines(',')}", CAPTIONS),
    "Excel's line about the separator": ("t.csv", f"sep=;\r\n{lines(';', end=chr(13) + chr(10))}", CAPTIONS),
    "newlines in cells": ("t.csv", quoted(with_captions(NEWLINES)), NEWLINES),
    "unquoted commas": ("t.csv", lines(",", rows=with_captions(COMMAS)), COMMAS),
    "unquoted commas, caption first": (
        "t.csv",
        lines(",", ("caption", "image"), rows=[(c, p) for p, c in with_captions(COMMAS)]),
        COMMAS,
    ),
    "unquoted commas beside numbers": (
        "t.csv",
        lines(",", ("n", "image", "caption"), rows=[("5", *r) for r in with_captions(COMMAS)]),
        COMMAS,
    ),
    "quotes in csv": ("t.csv", lines(",", rows=with_captions(QUOTES)), QUOTES),
    "quotes in tsv": ("t.tsv", lines("\t", rows=with_captions(QUOTES)), QUOTES),
    "quotes that would swallow rows": ("t.csv", lines(",", rows=with_captions(SWALLOW)), SWALLOW),
    "quotes that would swallow rows of tsv": (
        "t.tsv",
        lines("\t", ("caption", "image"), rows=[(c, p) for p, c in with_captions(SWALLOW)]),
        SWALLOW,
    ),
    "quotes doubled by a program, tsv": ("t.tsv", quoted(with_captions(QUOTES), delimiter="\t"), QUOTES),
    "other separators in captions": ("t.csv", lines("\t", rows=with_captions(HTML)), HTML),
    "backslashes in paths": ("t.csv", lines(",", rows=[(p.replace("/", "\\"), c) for p, c in ROWS]), CAPTIONS),
    "spaces around paths": ("t.csv", lines(" , "), CAPTIONS),
    "json lines": ("t.jsonl", "\n".join(json.dumps({"image": p, "caption": c}) for p, c in ROWS), CAPTIONS),
    "json lines gz": (
        "t.jsonl.gz",
        gzip.compress("\n".join(json.dumps({"image": p, "caption": c}) for p, c in ROWS).encode()),
        CAPTIONS,
    ),
    "json lines, upper-case": ("T.NDJSON", "\n".join(json.dumps({"Image": p, "Text": c}) for p, c in ROWS), CAPTIONS),
    "json list": ("t.json", json.dumps([{"image": p, "caption": c} for p, c in ROWS], indent=1), CAPTIONS),
    "json lines called json": ("t.json", "\n".join(json.dumps({"image": p, "caption": c}) for p, c in ROWS), CAPTIONS),
    "coco": (
        "t.json",
        json.dumps(
            {
                "images": [{"id": i, "file_name": p} for i, (p, _) in enumerate(ROWS)],
                "annotations": [{"id": 100 + i, "image_id": i, "caption": c} for i, (_, c) in enumerate(ROWS)],
                "licenses": [{"id": 1}],
            }
        ),
        CAPTIONS,
    ),
    "a list called jsonl": ("t.jsonl", json.dumps([{"image": p, "caption": c} for p, c in ROWS], indent=1), CAPTIONS),
    "captions by image": ("t.json", json.dumps(dict(ROWS)), CAPTIONS),
    "fields by image": ("t.json", json.dumps({p: {"title": c, "n": 1} for p, c in ROWS}), CAPTIONS),
    "sentences": (
        "t.json",
        json.dumps(
            {
                "images": [
                    {"filepath": "img", "filename": p, "sentences": [{"raw": c, "tokens": c.split()}], "split": "train"}
                    for p, c in ROWS
                ],
                "dataset": "flickr8k",
            }
        ),
        CAPTIONS,
    ),
    "quotes escaped by a database": (
        "t.csv",
        "image,caption\n" + "".join(f'{p},"{c}, \\"{c}\\""\n' for p, c in ROWS),
        [f'{c}, "{c}"' for c in CAPTIONS],
    ),
    "separators at the end of lines": ("t.csv", lines(",", rows=[(*r, "", "") for r in ROWS]), CAPTIONS),
    "separators at the end of lines with quotes": (
        "t.csv",
        "image,caption\n" + "".join(f'{p},"{c}",\n' for p, c in with_captions(COMMAS)),
        COMMAS,
    ),
    "base64": (
        "t.csv",
        lines(",", rows=[(base64.b64encode(image(i)).decode(), c) for i, c in enumerate(CAPTIONS)]),
        CAPTIONS,
    ),
    "data URLs": (
        "t.tsv",
        lines(
            "\t",
            rows=[(f"data:image/png;base64,{base64.b64encode(image(i)).decode()}", c) for i, c in enumerate(CAPTIONS)],
        ),
        CAPTIONS,
    ),
    "repeated ids": (
        "t.csv",
        lines(",", ("id", "image", "caption"), rows=[(str(i // 2), *r) for i, r in enumerate(ROWS)]),
        CAPTIONS,
    ),
    "a column of URLs beside": (
        "t.csv",
        lines(",", ("url", "path", "caption"), rows=[("http://x/y.jpg", *r) for r in ROWS]),
        CAPTIONS,
    ),
    "captions under the second name": (
        "t.csv",
        lines(",", ("image", "caption", "text"), rows=[(p, "http://x/y", c) for p, c in ROWS]),
        CAPTIONS,
    ),
    "numbers under the first name": (
        "t.csv",
        lines(",", ("image", "text", "title"), rows=[(p, str(i), c) for i, (p, c) in enumerate(ROWS)]),
        CAPTIONS,
    ),
    "ids under the first name": (
        "t.csv",
        lines(",", ("image", "filepath", "title"), rows=[(str(i), *r) for i, r in enumerate(ROWS)]),
        CAPTIONS,
    ),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_every_row_is_used_with_its_own_caption(kind: str, folder: Path) -> None:
    """Whatever separator, quoting, encoding, compression, header and names of columns: each image has its caption."""
    name, content, captions = WHOLE[kind]
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    pairs, causes = outcome(folder / name)
    assert causes == {}
    assert pairs == {i: [caption] for i, caption in enumerate(captions)}


def whole_but(*missing: int) -> Pairs:
    return {i: [caption] for i, caption in enumerate(CAPTIONS) if i not in missing}


def objects(change: Callable[[int], dict[str, Any] | str | None]) -> str:
    """JSON lines; `change` gives the fields of a row that differ, its text, or None."""
    rows = []
    for i, (path, caption) in enumerate(ROWS):
        fields = change(i)
        rows.append(
            fields if isinstance(fields, str) else json.dumps({"image": path, "caption": caption} | (fields or {}))
        )
    return "\n".join(rows)


FEW, MANY = "the row has too few cells", "the row has too many cells"
EMPTY, ENCODING = "the caption is empty", "the line is not of the table's encoding"
UNREAD = "a file cannot be read"

DEFECTS: dict[str, tuple[str, str | bytes, Pairs, dict[str, int]]] = {
    "too few cells": ("t.csv", lines(",").replace(f",{CAPTIONS[4]}", ""), whole_but(4), {FEW: 1}),
    "a missing separator": (
        "t.txt",
        lines(
            "|",
            ("image_name", "n", "comment"),
            rows=[(p, f"0 {c}") if i == 7 else (p, "0", c) for i, (p, c) in enumerate(ROWS)],
        ),
        whole_but(7),
        {FEW: 1},
    ),
    "separators in one of two texts": (
        "t.csv",
        lines(
            ",",
            ("image", "title", "caption"),
            rows=[(p, "red, round" if i == 2 else "red", c) for i, (p, c) in enumerate(ROWS)],
        ),
        whole_but(2),
        {MANY: 1},
    ),
    "separators in a caption in the middle": (
        "t.csv",
        lines(
            ",",
            ("image", "caption", "split"),
            rows=[(p, f"{c}, more" if i == 2 else c, "train") for i, (p, c) in enumerate(ROWS)],
        ),
        whole_but(2),
        {MANY: 1},
    ),
    "separators in the path": (
        "t.csv",
        lines(",", rows=[(p.replace("p9", "p, 9"), c) for p, c in ROWS]),
        whole_but(9),
        {MANY: 1},
    ),
    "empty captions and words for them": (
        "t.csv",
        lines(",", rows=[(p, ["", "nan", "None", "null", c][min(i, 4)]) for i, (p, c) in enumerate(ROWS)]),
        whole_but(0, 1, 2, 3),
        {EMPTY: 4},
    ),
    "missing files": (
        "t.csv",
        lines(",", rows=[(p if i % 3 else f"img/none{i}.png", c) for i, (p, c) in enumerate(ROWS)]),
        whole_but(0, 3, 6, 9),
        {UNREAD: 4},
    ),
    "a damaged byte in UTF-8": (
        "t.csv",
        lines(",", rows=with_captions(CHINESE)).encode().replace("5 on a table 一".encode(), b"5 on a table \xe4\xb8"),
        {i: [c] for i, c in enumerate(CHINESE) if i != 5},
        {ENCODING: 1},
    ),
    "a damaged JSON line": (
        "t.jsonl",
        objects(lambda i: '{"image": "img/p6.png", "cap' if i == 6 else None),
        whole_but(6),
        {"the line is not JSON": 1},
    ),
    "a JSON line that is no object": (
        "t.jsonl",
        objects(lambda i: '["a", "b"]' if i == 6 else None),
        whole_but(6),
        {"the line is not a JSON object": 1},
    ),
    "JSON null": (
        "t.jsonl",
        objects(lambda i: {"caption": None} if i % 3 == 0 else None),
        whole_but(0, 3, 6, 9),
        {EMPTY: 4},
    ),
    "JSON NaN": ("t.jsonl", objects(lambda i: {"caption": float("nan")} if i == 0 else None), whole_but(0), {EMPTY: 1}),
    "a first row without caption": (
        "t.jsonl",
        objects(lambda i: '{"image": "img/p0.png"}' if i == 0 else None),
        whole_but(0),
        {EMPTY: 1},
    ),
    "numbers, truth values and objects": (
        "t.jsonl",
        objects(lambda i: {"caption": [3, True, {"en": "a cat"}][i]} if i < 3 else None),
        whole_but(0, 1, 2),
        {"the caption is no text": 3},
    ),
    "images without annotation, annotations without image": (
        "t.json",
        json.dumps(
            {
                "images": [{"id": i, "file_name": p} for i, (p, _) in enumerate(ROWS) if i != 5],
                "annotations": [{"image_id": i, "caption": c} for i, (_, c) in enumerate(ROWS) if i != 3] + [7],
            }
        ),
        whole_but(3, 5),
        {EMPTY: 1, "the row has no image": 1, "the entry is not a JSON object": 1},
    ),
    "URLs in some rows": (
        "t.csv",
        lines(",", rows=[("https://x.org/a.jpg" if i == 1 else p, c) for i, (p, c) in enumerate(ROWS)]),
        whole_but(1),
        {"the image is a URL": 1},
    ),
    "damaged base64": (
        "t.csv",
        lines(
            ",",
            rows=[
                (base64.b64encode(image(i)).decode()[: -1 if i == 3 else None].replace("C", "!" if i == 3 else "C"), c)
                for i, c in enumerate(CAPTIONS)
            ],
        ),
        whole_but(3),
        {"the base64 of the image is damaged": 1},
    ),
    "no image": (
        "t.jsonl",
        objects(lambda i: {"image": [None, "", 3][i]} if i < 3 else None),
        whole_but(0, 1, 2),
        {"the row has no image": 3},
    ),
}


@pytest.mark.parametrize("kind", DEFECTS)
def test_a_bad_row_is_left_out_by_its_cause_and_the_others_are_used(kind: str, folder: Path) -> None:
    """One bad row never refuses a table or spoils its neighbours: it is counted, and each of the others is right."""
    name, content, pairs, causes = DEFECTS[kind]
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    assert outcome(folder / name) == (pairs, causes)


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("t.csv", lines(",").replace(f",{CAPTIONS[4]}", ""), "line 6"),
        ("t.csv", lines(",", end="\r\n").replace(f",{CAPTIONS[4]}", ""), "line 6"),
        ("t.csv", quoted(with_captions(NEWLINES)) + "img/p0.png\n", "line 26"),
        ("t.jsonl", objects(lambda i: "{" if i == 9 else None), "line 10"),
        ("t.jsonl", objects(lambda i: "\n\n{" if i == 2 else None), "line 5"),
    ],
)
def test_the_line_of_a_bad_row_is_named(name: str, content: str, place: str, folder: Path) -> None:
    """The line number counts the lines of the file, as an editor does."""
    (folder / name).write_bytes(content.encode())
    ((where, error),) = open_records(folder / name).defects()
    assert where == place
    assert error.remedy


def test_a_cell_of_several_lines_is_one_caption(folder: Path) -> None:
    """Training never takes a line of a cell for a caption of its own."""
    (folder / "t.csv").write_text(quoted(with_captions(NEWLINES)))
    fields = open_records(folder / "t.csv").load(4)[1]
    assert every_caption(fields, "{txt}") == [NEWLINES[4]]


SEVERAL = [[caption, f"second {caption}", f"third, {caption}"][: i % 3 + 1] for i, caption in enumerate(CAPTIONS)]


def test_several_captions_of_an_image_stay_apart(folder: Path) -> None:
    """A list in JSON, in Parquet or in the text of a CSV, or several rows of an image: each text is a caption of its
    own."""
    expected = dict(enumerate(SEVERAL))
    (folder / "a.jsonl").write_text(objects(lambda i: {"caption": [*SEVERAL[i], None, ""]}))
    assert outcome(folder / "a.jsonl") == (expected, {})
    for n, write in enumerate((json.dumps, repr)):
        rows = [(path, write(SEVERAL[i])) for i, (path, _) in enumerate(ROWS)]
        (folder / f"b{n}.csv").write_text(quoted(rows))
        assert outcome(folder / f"b{n}.csv") == (expected, {})
    rows = [(path, caption) for i, (path, _) in enumerate(ROWS) for caption in SEVERAL[i]]
    (folder / "c.csv").write_text(quoted(rows))
    assert outcome(folder / "c.csv") == (expected, {})
    table = pa.table({"image": [path for path, _ in ROWS], "captions": SEVERAL})
    pq.write_table(table, folder / "d.parquet")
    assert outcome(folder / "d.parquet") == (expected, {})
    pq.write_table(table.rename_columns(["image", "txt"]), folder / "e.parquet")
    assert outcome(folder / "e.parquet") == (expected, {})
    fields = open_records(folder / "d.parquet").load(2)[1]
    assert fields == {"image": "img/p2.png", "txt": SEVERAL[2][0], "captions": SEVERAL[2]}


@pytest.mark.parametrize("kind", ["bytes", "paths"])
def test_a_list_of_images_in_a_cell_is_one_sample(kind: str, folder: Path) -> None:
    """Hugging Face's lists of images, and lists of paths: all images of a row arrive, in their order."""
    lists = [[0, 1], [2], [3, 4, 5]]
    cells = [[{"bytes": image(n), "path": None} if kind == "bytes" else f"img/p{n}.png" for n in row] for row in lists]
    pq.write_table(pa.table({"images": cells, "caption": CAPTIONS[:3]}), folder / "t.parquet")
    records = open_records(folder / "t.parquet")
    assert [[NUMBERS[content] for content in records.load(n)[0]] for n in range(3)] == lists


def parquet(path: Path, numbers: Sequence[int], kind: str) -> None:
    """A Parquet file of some of the pairs, its images as paths, categories, bytes, or as Hugging Face stores them."""
    contents: dict[str, pa.Array] = {
        "paths": pa.array([f"img/p{i}.png" for i in numbers]),
        "categories": pa.array([f"img/p{i}.png" for i in numbers]).dictionary_encode(),
        "bytes": pa.array([image(i) for i in numbers]),
        "large bytes": pa.array([image(i) for i in numbers], pa.large_binary()),
        "hugging face": pa.array([{"bytes": image(i), "path": "x.png"} for i in numbers]),
        "hugging face paths": pa.array([{"bytes": None, "path": f"img/p{i}.png"} for i in numbers]),
    }
    path.parent.mkdir(exist_ok=True)
    pq.write_table(
        pa.table({"image": contents[kind], "caption": [CAPTIONS[i] for i in numbers]}), path, row_group_size=3
    )


KINDS = ["paths", "categories", "bytes", "large bytes", "hugging face", "hugging face paths"]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_one_image_belong_together(kind: str, folder: Path) -> None:
    """In every form of a table, all rows of an image have the first of them as owner, so no split parts them."""
    numbers = [0, 1, 2, 1, 0, 3, 2, 2]
    parquet(folder / "t.parquet", numbers, kind)
    records = open_records(folder / "t.parquet")
    assert [int(owner) for owner in records.owners()] == [numbers.index(number) for number in numbers]


@pytest.mark.parametrize("kind", ["paths", "bytes"])
@pytest.mark.parametrize("where", ["{folder}/part", "{folder}/part/*.parquet", "{folder}/part/t-?.parquet"])
def test_parquet_files_in_a_folder_are_one_table(kind: str, where: str, folder: Path) -> None:
    """A folder or a glob of Parquet files is one table; rows of one image in two files belong together."""
    for i in range(COUNT if kind == "paths" else 0):
        (folder / "part" / "img").mkdir(parents=True, exist_ok=True)
        (folder / "part" / "img" / f"p{i}.png").write_bytes(image(i))
    parquet(folder / "part" / "t-0.parquet", range(7), kind)
    parquet(folder / "part" / "t-1.parquet", [0, *range(7, COUNT)], kind)
    place = Path(where.format(folder=folder))
    assert outcome(place) == ({**whole_but(), 0: [CAPTIONS[0]] * 2}, {})
    records = open_records(place)
    assert records.owners()[7] == records.keys()[0]
    assert "2 tables" in records.describe()


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("inner", ["", "cats"])
def test_the_metadata_of_an_image_folder_is_read(suffix: str, inner: str, tmp_path: Path) -> None:
    """Hugging Face's ImageFolder: the captions are in metadata.csv, .jsonl or .parquet beside the images."""
    root = tmp_path / "data"
    (root / inner).mkdir(parents=True)
    rows = [{"file_name": f"p{i}.png", "text": caption} for i, caption in enumerate(CAPTIONS)]
    for i in range(COUNT):
        (root / inner / f"p{i}.png").write_bytes(image(i))
    path = root / inner / f"metadata.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        path.write_text(lines(",", ("file_name", "text"), rows=[tuple(row.values()) for row in rows]))
    assert outcome(root) == (whole_but(), {})


@pytest.mark.parametrize(
    "names", [("train-0.parquet", "test-0.parquet"), ("train/metadata.csv", "validation/metadata.csv")]
)
def test_splits_in_one_folder_are_not_mixed(names: Sequence[str], folder: Path) -> None:
    """A folder whose tables are named after splits is refused, with the names to choose from."""
    for name in names:
        (folder / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("parquet"):
            parquet(folder / "d" / name, range(COUNT), "bytes")
        else:
            (folder / "d" / name).write_text(lines(","))
    with pytest.raises(UserError, match="has several splits; name one") as caught:
        open_records(folder / "d")
    assert all(name in str(caught.value) for name in names)


def test_images_in_a_folder_beside_the_table_are_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths may also be relative to a folder beside the table, as in Flickr8k, to that above, or to the current one."""
    (folder / "captions.txt").write_text(lines(",", rows=[(Path(p).name, c) for p, c in ROWS]))
    assert outcome(folder / "captions.txt") == (whole_but(), {})
    assert f"images in {folder / 'img'}" in open_records(folder / "captions.txt").describe()
    (folder / "far" / "tables").mkdir(parents=True)
    (folder / "far" / "tables" / "t.csv").write_text(lines(","))
    assert outcome(folder / "far" / "tables" / "t.csv")[0] == {}
    monkeypatch.chdir(folder)
    assert outcome(folder / "far" / "tables" / "t.csv") == (whole_but(), {})
    (folder / "tables").mkdir()
    (folder / "tables" / "t.csv").write_text(lines(","))
    monkeypatch.chdir("/")
    assert outcome(folder / "tables" / "t.csv") == (whole_but(), {})


def test_file_urls_are_paths(folder: Path) -> None:
    """A column of file:// URLs is read from the disk."""
    rows = [((folder / path).as_uri(), caption) for path, caption in ROWS]
    (folder / "t.csv").write_text(lines(",", ("url", "caption"), rows=rows))
    assert outcome(folder / "t.csv") == (whole_but(), {})


SPELLED = {
    "accents composed in the table": ("cafe\u0301 {}.png", "caf\xe9 {}.png"),
    "accents decomposed in the table": ("caf\xe9 {}.png", "cafe\u0301 {}.png"),
    "percent signs": ("a b {}.png", "a%20b%20{}.png"),
    "percent signs in the name": ("a%20b {}.png", "a%20b {}.png"),
    "home folder": ("home/{}.png", "~/home/{}.png"),
    "windows": ("sub dir/{}.png", "sub dir\\{}.png"),
    "windows, from here": ("sub/{}.png", ".\\sub\\{}.png"),
    "dots": ("sub/{}.png", "./other/../sub/{}.png"),
    "another folder of the one above": ("../train2017/{}.png", "{}.png"),
    "hash sign": ("a#1 {}.png", "a#1 {}.png"),
}


@pytest.mark.parametrize("kind", SPELLED)
def test_paths_are_read_as_people_write_them(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names in another form than on the disk lead to their file: accents, home folder, %20, backslashes, dots."""
    on_disk, written = SPELLED[kind]
    place = tmp_path / "tables"
    (place / "other").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(place))
    monkeypatch.chdir(tmp_path)
    for i in range(COUNT):
        path = place / on_disk.format(i)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image(i))
    (place / "t.csv").write_text(lines(",", rows=[(written.format(i), c) for i, c in enumerate(CAPTIONS)]))
    assert outcome(place / "t.csv") == (whole_but(), {})


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "t.csv",
            lines(",", ("URL", "TEXT"), rows=[(f"http://x.org/{i}.jpg", c) for i, c in enumerate(CAPTIONS)]),
            ["'URL'", "img2dataset", "--url_col URL --caption_col TEXT", "give its shards"],
        ),
        (
            "t.csv",
            lines(",", ("image", "caption"), rows=[(f"https://x.org/{i}", c) for i, c in enumerate(CAPTIONS)]),
            ["'image'", "img2dataset"],
        ),
        (
            "t.csv",
            lines(",", ("image", "caption"), rows=[(p, str(i)) for i, (p, _) in enumerate(ROWS)]),
            ["'caption'", "holds no captions", "--caption-column", "image, caption"],
        ),
        (
            "t.csv",
            lines(",", ("image", "text"), rows=[(p, f"http://x/{i}") for i, (p, _) in enumerate(ROWS)]),
            ["'text'", "holds no captions", "http://x/0"],
        ),
        ("t.csv", lines(",", ("photo", "words")), ["no image column", "photo, words", "--image-column photo"]),
        ("t.csv", lines(",", ("image", "words")), ["no caption column", "image, words", "--caption-column words"]),
        (
            "t.csv",
            lines(",", [f"c{i}" for i in range(500)], rows=[["1"] * 500]),
            ["no image column", "c0, c1", "c19 ... (500)"],
        ),
        (
            "t.csv",
            lines(",", (), rows=[(p, c, c) for p, c in ROWS]),
            ["no line with the names", "2 and 3", "--caption-column"],
        ),
        ("t.csv", "", ["no rows"]),
        ("t.csv", "image,caption\n", ["no rows"]),
        ("t.txt", "words alone\nand more\n", ["is not a table", "--separator"]),
        ("t.jsonl", "{]\n{]\n", ["cannot be read", "2 rows", "line 1"]),
        ("t.json", "{]", ["cannot be read"]),
        ("t.json", '{"images": 5, "annotations": [{"image_id": [1]}]}', ["has no image column"]),
        ("t.csv.gz", b"no gzip", ["cannot be read"]),
    ],
)
def test_tables_that_cannot_be_used_are_explained(
    name: str, content: str | bytes, words: list[str], folder: Path
) -> None:
    """One line says what was found, and the option or the command that helps."""
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError) as caught:
        open_records(folder / name)
    assert "\n" not in str(caught.value)
    assert [word for word in words if word not in str(caught.value)] == []


def test_options_overrule_what_would_be_recognised(folder: Path) -> None:
    """Columns, separator and encoding can be given, in any case; what was recognised or given is described."""
    rows = [(p, "wrong", c) for p, c in with_captions(WESTERN)]
    (folder / "t.csv").write_bytes(lines(";", ("photo", "caption", "words"), rows=rows).encode("latin-1"))
    options = {"image_column": "Photo", "caption_column": "words", "separator": "semicolon", "encoding": "latin-1"}
    assert outcome(folder / "t.csv", **options) == (dict(enumerate([c] for c in WESTERN)), {})
    assert open_records(folder / "t.csv", **options).describe() == (
        f"{folder / 't.csv'}: read as semicolon-separated, iso8859-1, image column 'photo', caption column 'words', "
        "12 rows"
    )
    (folder / "u.csv").write_bytes(lines("\t", ("filepath", "title"), rows=with_captions(WESTERN)).encode("cp1252"))
    assert "read as tab-separated, windows-1252, image column 'filepath', caption column 'title', 12 rows" in (
        open_records(folder / "u.csv").describe()
    )
    (folder / "n.csv").write_text(lines(",", (), rows=[(p, c, f"other {c}") for p, c in ROWS]))
    assert outcome(folder / "n.csv", caption_column="3")[0][4] == [f"other {CAPTIONS[4]}"]
    (folder / "s.csv").write_text(lines("~"))
    assert outcome(folder / "s.csv", separator="~") == (whole_but(), {})
    for separator, encoding, words in (("ab", None, "one character"), (None, "klingon", "unknown")):
        with pytest.raises(UserError, match=words):
            open_records(folder / "s.csv", separator=separator, encoding=encoding)
