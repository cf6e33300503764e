"""Random tables with a known truth: every row is a pair with the right caption, or is counted with its cause."""

import csv
import io
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmssl.data import iter_samples
from mmssl.data.packing.packer import pack
from mmssl.data.packing.records import RecordError, join_owners
from mmssl.data.packing.tables import open_records
from mmssl.errors import UserError

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
IMAGE_NAMES = st.sampled_from(["image", "Image Path", "FILEPATH", "file_name", " filename"])
CAPTION_NAMES = st.sampled_from(["caption", "Title", "TEXT", "description ", "comment"])
DEFECTS = st.sampled_from([None, None, None, None, "short", "empty", "missing"])
FORMS = st.sampled_from([",", "\t", ";", "|", "jsonl", "json"])
ENCODINGS = st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])


@st.composite
def tables(draw: st.DrawFn) -> tuple[str, bytes, dict[str, str], Counter[str]]:
    """File name and content of a table, its true pairs, and the number of bad rows by cause."""
    captions = draw(st.lists(CAPTIONS, min_size=4, max_size=9))
    defects = [None, None, *(draw(DEFECTS) for _ in captions[2:])]
    names = [draw(IMAGE_NAMES), draw(CAPTION_NAMES)]
    form, end, swapped = draw(FORMS), draw(st.sampled_from(["\n", "\r\n"])), draw(st.booleans())
    truth: dict[str, str] = {}
    causes: Counter[str] = Counter()
    rows: list[list[str | None]] = []
    for number, (caption, defect) in enumerate(zip(captions, defects, strict=True)):
        path = f"img/p{number}.png" if defect != "missing" else f"img/none{number}.png"
        if defect is None:
            truth[path] = caption
        json_like = form in ("jsonl", "json")
        cause = {"empty": "the caption is empty", "missing": "a file cannot be read"}.get(str(defect))
        if defect == "short":
            cause = "the caption is empty" if json_like else "the row has too few cells"
        causes.update([cause] if cause else [])
        rows.append([path, {"empty": "", "short": None}.get(str(defect), caption)])
    if form in ("jsonl", "json"):
        objects = [{n.strip(): c for n, c in zip(names, row, strict=True) if c is not None} for row in rows]
        text = json.dumps(objects) if form == "json" else end.join(map(json.dumps, objects))
        return f"t.{form}", text.encode(draw(ENCODINGS)), truth, causes
    file = io.StringIO()
    order = (1, 0) if swapped else (0, 1)
    writer = csv.writer(file, delimiter=form, lineterminator=end)
    for row in [names, *rows]:
        writer.writerow([row[i] for i in order if row[i] is not None])
    suffix = draw(st.sampled_from(["csv", "CSV", "txt"] + (["tsv"] if form == "\t" else [])))
    return f"t.{suffix}", file.getvalue().encode(draw(ENCODINGS)), truth, causes


def outcome(source: Path) -> tuple[dict[str, str], Counter[str], int]:
    """The pairs of a table, the causes of the other rows, and the number of rows that the table offers."""
    records = open_records(source)
    pairs: dict[str, str] = {}
    defects = records.defects()
    causes = Counter(error.cause for _, error in defects)
    keys = records.keys()
    for number in range(len(keys)):
        try:
            content, fields = records.load(number)
        except RecordError as error:
            causes[error.cause] += 1
        else:
            pairs[content.decode()] = fields["txt"]
    return pairs, causes, len(keys) + len(defects)


@settings(max_examples=1000, deadline=None)
@given(tables())
def test_offered_is_used_and_left_out(table: tuple[str, bytes, dict[str, str], Counter[str]]) -> None:
    """In random tables with random defects, each pair used is the true one, each other row is counted by its cause, and
    both together are all rows."""
    name, content, truth, causes = table
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "img").mkdir()
        for number in range(9):  # the content of each image is its name: packing alone decodes images
            (Path(folder) / f"img/p{number}.png").write_bytes(f"img/p{number}.png".encode())
        (Path(folder) / name).write_bytes(content)
        pairs, found, offered = outcome(Path(folder) / name)
    assert pairs == truth
    assert found == causes
    assert offered == len(pairs) + sum(found.values()) == len(truth) + sum(causes.values())


@settings(max_examples=1000, deadline=None)
@given(st.text(alphabet='ab,;\t|"\n\r\x00é.png/', max_size=80), st.sampled_from(["csv", "tsv", "txt", "jsonl", "json"]))
def test_any_text_is_read_or_refused_in_one_line(text: str, suffix: str) -> None:
    """No text crashes the reader: it gives rows, or a message of one line."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"t.{suffix}"
        path.write_text(f"image,caption\n{text}" if len(text) % 2 else text, encoding="utf-8", newline="")
        message, offered = "", 0
        try:
            offered = outcome(path)[2]
        except UserError as error:
            message = str(error)
    assert (offered > 0) != bool(message)
    assert "\n" not in message


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
