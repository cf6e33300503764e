"""Random folders, tables and tars of pairs with a known truth: strategies of hypothesis."""

import csv
import io
import json
import re
import tarfile
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from hypothesis import strategies as st
from PIL import Image

from tests.helpers.images import encode
from tests.helpers.tars import File, tar_bytes

WORDS = st.sampled_from(
    [
        "red",
        "fox",
        "a",
        "12",
        "café",
        "naïve",
        "Straße",
        'the "best"',
        "x; y",
        "a | b",
        "so, so",
        "5'",
        "#1",
        "日本",
        "кот",
    ]
)
CAPTIONS = st.lists(WORDS, min_size=2, max_size=6).map(lambda words: "seen " + " ".join(words))
ENCODINGS = st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
STEMS = st.text(st.sampled_from("abB_- é1東0"), min_size=1, max_size=6).map(str.strip)


@dataclass(repr=False)
class Case:
    """A source, and what must become of it."""

    start: str
    """The file to pack. Empty: the folder itself."""
    files: dict[str, bytes] = field(default_factory=dict)
    """Path -> content."""
    pairs: dict[bytes, str] = field(default_factory=dict)
    """Image -> caption of each pair that is used."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Cause -> number of pairs."""

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What hypothesis shows of a failure."""
        printer.text(repr(self))

    def __repr__(self) -> str:
        """The files but for the images and archives, and what is left out."""
        texts = {path: content for path, content in self.files.items() if not path.endswith(("png", "tar"))}
        return f"{[*self.files]}, {texts}, {self.left_out}"

    def expect(self, image: bytes, caption: str, cause: str | None) -> None:
        """Note the truth about a pair. No cause: it is used."""
        if cause is None:
            self.pairs[image] = caption
        else:
            self.left_out[cause] += 1


@cache
def image(number: int) -> bytes:
    """A small image unlike the others."""
    return encode(Image.new("RGB", (4, 4), (number * 9 % 256, number // 28, 99)), "PNG")


IN_FOLDERS = {
    "text": None,
    "caption file": None,
    "json": None,
    "double extension": None,
    "other case": None,
    "decomposed": None,
    "marked utf-16": None,
    "several": None,
    "bare": "no caption",
    "alone": "no image beside the caption",
    "empty": "the caption is empty",
    "blank": "the caption is empty",
    "latin": "the text is not UTF-8",
    "nulls": "the caption holds null characters",
    "json null": "the caption is empty",
    "json number": "the caption is no text",
    "json damaged": "the .json is damaged",
    "json list": "the .json is not a JSON object",
    "heic": ".heic files beside a caption are not read as images",
    "hidden": "the file or its folder is hidden",
    "broken": "the image is broken or cut",
}
"""Form or defect of a pair in a folder -> the cause for which it is left out."""


@st.composite
def folders(draw: st.DrawFn) -> Case:
    """A folder of images with captions beside them, each in another form or with another defect."""
    case = Case("")
    kinds = draw(st.lists(st.sampled_from([*IN_FOLDERS]), min_size=1, max_size=7))
    for number, kind in enumerate(["text", "text", *kinds]):
        place = draw(st.sampled_from(["", "x/"])) if number > 1 else ("", "x/")[number]
        name = f"{draw(STEMS)}é{number}"
        add_files(case, f"{place}{name}", kind, number, draw(CAPTIONS))
    return case


def add_files(case: Case, name: str, kind: str, number: int, caption: str) -> None:
    """Add a pair of one kind to a folder."""
    content = {"broken": image(number)[:40]}.get(kind, image(number))
    extension, text, suffix = ".png", name, ".txt"
    if kind == "hidden":
        folder, slash, base = name.rpartition("/")
        name = text = f"{folder}{slash}.h{base}"
    written = {
        "empty": b"",
        "blank": b" \n",
        "latin": caption.encode("latin-1", "replace") + b"\xe9",
        "nulls": caption.encode("utf-16-le")[: 2 * len("seen ")],
        "marked utf-16": caption.encode("utf-16"),
    }.get(kind, caption.encode())
    if kind.startswith("json") or kind == "several":
        suffix = ".json"
        value = {"json null": None, "json number": 5, "several": ["", caption, "another one"]}.get(kind, caption)
        written = json.dumps({"n": number, "caption": value}).encode()
        written = {"json damaged": written[:-1], "json list": b"[1]"}.get(kind, written)
    elif kind == "caption file":
        suffix = ".caption"
    elif kind == "double extension":
        suffix = ".png.txt"
    elif kind == "other case":
        text, suffix = text.swapcase(), ".TXT"
    elif kind == "decomposed":
        text = unicodedata.normalize("NFD", text)
    elif kind == "heic":
        extension = ".heic"
    if kind != "alone":
        case.files[name + extension] = content
    if kind != "bare":
        place = name.rpartition("/")[0]
        case.files[(f"{place}/" if place else "") + text.rpartition("/")[2] + suffix] = written
    case.expect(content, caption, IN_FOLDERS[kind])


IN_TARS = {
    "text": None,
    "text and fields": None,
    "json": None,
    "decomposed": None,
    "other case": None,
    "no text": "no text",
    "no image": "no image",
    "empty": "the caption is empty",
    "blank": "the caption is empty",
    "latin": ".txt is not UTF-8",
    "nulls": "the caption holds null characters",
    "json null": "the caption is empty",
    "json list": ".json holds a list instead of an object",
    "link": ".png is refused",
    "broken": "the image is broken or cut",
}
"""Form or defect of a sample in a tar -> the cause for which it is left out when it is packed."""


@st.composite
def tars(draw: st.DrawFn) -> Case:
    """A tar of samples, each in another form or with another defect, in any order and with or without folders."""
    case, files = Case("x.tar"), list[File | tarfile.TarInfo]()
    style = draw(st.sampled_from(["", ".v1", ".2024.01"]))
    layout = draw(st.sampled_from(["", "in/", "./", "two folders"]))
    for number, kind in enumerate(["text", *draw(st.lists(st.sampled_from([*IN_TARS]), min_size=1, max_size=7))]):
        files += sample_files(case, f"{draw(STEMS)}é{number}{style}", kind, number, draw(CAPTIONS))
    named: list[File | tarfile.TarInfo] = []
    for file in draw(st.permutations(files)) if draw(st.booleans()) else files:
        name = file.name if isinstance(file, tarfile.TarInfo) else file[0]
        place = layout if layout != "two folders" else "images/" if name.endswith("png") else "texts/"
        if isinstance(file, tarfile.TarInfo):
            file.name = place + name
            named.append(file)
        else:
            named.append((place + name, file[1]))
    if links := case.left_out.pop(IN_TARS["link"], 0):  # the cause names the member without the numbers of its sample
        case.left_out[re.sub(r"\d+", "N", f"{style}{IN_TARS['link']}")] = links
    case.files["x.tar"] = tar_bytes(named, draw(st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])))
    return case


def sample_files(case: Case, key: str, kind: str, number: int, caption: str) -> list[File | tarfile.TarInfo]:
    """The members of a sample of one kind."""
    content = image(number)[:40] if kind == "broken" else image(number)
    files: list[File | tarfile.TarInfo] = [(f"{key}.png", content)]
    if kind == "link":
        link = tarfile.TarInfo(f"{key}.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        files = [link]
    text = {"decomposed": unicodedata.normalize("NFD", key), "other case": key.swapcase()}.get(kind, key)
    written = {
        "empty": b"",
        "blank": b" \n",
        "latin": b"caf\xe9",
        "nulls": caption.encode("utf-16-le")[: 2 * len("seen ")],
    }.get(kind, caption.encode())
    if kind.startswith("json"):
        value = None if kind == "json null" else caption
        fields = b"[1]" if kind == "json list" else json.dumps({"caption": value}).encode()
        files.append((f"{text}.json", fields))
    elif kind != "no text":
        files.append((f"{text}.txt", written))
    if kind == "text and fields":
        files.append((f"{key}.json", b'{"caption": "another", "n": 1}'))
    case.expect(content, caption, IN_TARS[kind])
    return files[1:] if kind == "no image" else files


IN_TABLES = {
    "row": None,
    "percent signs": None,
    "backslashes": None,
    "decomposed": None,
    "short": "the row has too few cells",
    "empty": "the caption is empty",
    "missing": "a file cannot be read",
    "URL": "the image is a URL",
    "nulls": "the caption holds null characters",
    "broken": "the image is broken or cut",
}
"""Form or defect of a row -> the cause for which it is left out."""


@st.composite
def tables(draw: st.DrawFn) -> Case:
    """A table of paths and captions of any form, separator, encoding and order of columns."""
    names = [
        draw(st.sampled_from(["image", "Image Path", "FILEPATH", "file_name", " filename"])),
        draw(st.sampled_from(["caption", "Title", "TEXT", "description ", "comment"])),
    ]
    form = draw(st.sampled_from([",", "\t", ";", "|", "jsonl", "json"]))
    suffix = draw(st.sampled_from(["csv", "CSV", "txt", *(["tsv"] if form == "\t" else [])]))
    case = Case(f"t.{form}" if form.startswith("json") else f"t.{suffix}")
    rows: list[list[str | None]] = []
    kinds = draw(st.lists(st.sampled_from([*IN_TABLES]), min_size=1, max_size=5))
    for number, kind in enumerate(["row", "row", "row", *kinds, "row", "row"]):
        rows.append(table_row(case, kind, number, draw(CAPTIONS), form))
    end = draw(st.sampled_from(["\n", "\r\n"]))
    if form.startswith("json"):
        objects = [{n.strip(): c for n, c in zip(names, row, strict=True) if c is not None} for row in rows]
        text = json.dumps(objects) if form == "json" else end.join(map(json.dumps, objects))
    else:
        file, order = io.StringIO(), (1, 0) if draw(st.booleans()) else (0, 1)
        writer = csv.writer(file, delimiter=form, lineterminator=end)
        for row in [names, *rows]:
            writer.writerow([row[i] for i in order if row[i] is not None])
        text = file.getvalue()
    case.files[case.start] = text.encode(draw(ENCODINGS))
    return case


def table_row(case: Case, kind: str, number: int, caption: str, form: str) -> list[str | None]:
    """Path and caption of a row; None: there is no such cell."""
    on_disk = {"decomposed": f"img/café {number}.png", "percent signs": f"img/a b{number}.png"}
    path = on_disk.get(kind, f"img/p{number}.png")
    content = image(number)[:40] if kind == "broken" else image(number)
    if kind != "missing":
        case.files[path] = content
    cause = IN_TABLES[kind]
    if kind == "short" and form.startswith("json"):
        cause = "the caption is empty"
    case.expect(content, caption, cause)
    written = {
        "percent signs": path.replace(" ", "%20"),
        "backslashes": path.replace("/", "\\"),
        "decomposed": unicodedata.normalize("NFD", path),
        "URL": f"https://example.org/{number}.png",
    }.get(kind, path)
    return [written, {"short": None, "empty": "", "nulls": f"{caption}\0"}.get(kind, caption)]
