"""`mmssl shards suspects` and `correct`: from shards to a table, and from the corrected table to new shards."""

import csv
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmssl.data import expand, iter_samples
from tests.cli.test_main import fails, main_ok
from tests.helpers.images import encode, photo
from tests.helpers.tars import tar_bytes

MODEL = str(Path(__file__).parents[1] / "golden" / "model")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Twelve samples in two shards: captions with commas, quotes and lines, labels in JSON, and other members."""
    folder = tmp_path / "data"
    folder.mkdir()
    for shard in range(2):
        files = []
        for i in range(6):
            record = {"label": f"kind {i % 2}", "tags": ["a", "é"], "id": 10 * shard + i}
            files += [
                (f"s{i}.png", encode(photo(20, 24 + i), "PNG")),
                (f"s{i}.txt", f'caption {shard}{i}, "größer"\nline'.encode()),
                (f"s{i}.json", json.dumps(record).encode()),
                (f"s{i}.npy", bytes(range(i + 1))),
            ]
        (folder / f"{shard}.tar").write_bytes(tar_bytes(files))
    return folder


def table_of(shards: Path, out: Path, *options: str) -> list[dict[str, str]]:
    """The rows that `suspects` writes."""
    main_ok(["shards", "suspects", MODEL, str(shards / "*.tar"), "--out", str(out), *options])
    with (out / "suspects.csv").open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def rewrite(path: Path, rows: list[dict[str, str]], separator: str = ",") -> None:
    """Save the table as a spreadsheet does."""
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)


def members(folder: Path) -> dict[tuple[str, str], bytes]:
    """Content of every member of every shard, by shard and name."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                content = tar.extractfile(member)
                assert content is not None
                found[path.name, member.name] = content.read()
    return found


def test_every_sample_is_ranked_with_its_fields(shards: Path, tmp_path: Path) -> None:
    """The table holds the samples as they are in the shards, most suspicious first, and the sheet draws them."""
    rows = table_of(shards, tmp_path / "out")
    samples = {(s.shard, s.key): s.fields for s in iter_samples(expand([str(shards)]))}
    assert {(row["shard"], row["key"]): (row["txt"], row["label"]) for row in rows} == {
        place: (fields["txt"], fields["label"]) for place, fields in samples.items()
    }
    suspicion = [float(row["suspicion"]) for row in rows]
    assert suspicion == sorted(suspicion, reverse=True)
    assert {row["keep"] for row in rows} == {"yes"}
    with Image.open(tmp_path / "out" / "suspects.png") as sheet:
        assert np.ptp(np.array(sheet)) > 200
    assert len(table_of(shards, tmp_path / "few", "--count", "3", "--shown", "2")) == 3


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_corrected_table_is_read_back(
    shards: Path, tmp_path: Path, separator: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Changed cells are written, samples marked no are gone, and every other byte of every member is as before."""
    rows = table_of(shards, tmp_path / "out")
    place = {(Path(row["shard"]).name, row["key"]): row for row in rows}
    place["0.tar", "s1"]["txt"] = 'eine "neue", größere Zeile; ja'
    place["0.tar", "s2"]["label"] = "kind é"
    place["1.tar", "s5"] |= {"txt": "both", "label": "changed"}
    place["1.tar", "s0"]["keep"] = "no"
    rewrite(tmp_path / "out" / "suspects.csv", rows, separator)
    table = ["--table", str(tmp_path / "out" / "suspects.csv"), "--out", str(tmp_path / "new")]
    main_ok(["shards", "correct", str(shards / "*.tar"), *table])
    assert "3 samples corrected, 1 left out, 8 copied as they were" in capsys.readouterr().out
    before, after = members(shards), members(tmp_path / "new")
    assert {name for name in before if name not in after} == {
        ("1.tar", f"s0.{e}") for e in ("png", "txt", "json", "npy")
    }
    assert after["0.tar", "s1.txt"].decode() == 'eine "neue", größere Zeile; ja'
    assert after["1.tar", "s5.txt"] == b"both"
    for name, label in ((("0.tar", "s2.json"), "kind é"), (("1.tar", "s5.json"), "changed")):
        assert json.loads(after[name]) == json.loads(before[name]) | {"label": label}
    changed = {("0.tar", "s1.txt"), ("0.tar", "s2.json"), ("1.tar", "s5.txt"), ("1.tar", "s5.json")}
    assert all(after[name] == before[name] for name in after if name not in changed)
    assert (tmp_path / "new" / "0.tar.idx").is_file()
    fails(["shards", "correct", str(shards / "*.tar"), *table], capsys, "0.tar exists")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"keep": "maybe"}, ["row 2", "'maybe'", "yes or no"]),
        ({"key": "s9"}, ["no usable sample 's9'"]),
        ({"shard": "/gone/7.tar"}, ["/gone/7.tar", "not among those given"]),
        ({"txt": " "}, ["the cell of 'txt' is empty", "write no under keep"]),
        ({"id": "first"}, ["'first' for 'id'", "write it like"]),
        ({"tags": "a, b"}, ["'a, b' for 'tags'"]),
        ({"colour": "red"}, ["has no field 'colour'"]),
    ],
)
def test_mistakes_in_the_table_are_named(
    shards: Path, tmp_path: Path, change: dict[str, str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A correction that fits nothing ends in one line, before anything is written."""
    rows = table_of(shards, tmp_path / "out")[:1]
    rows[0] |= change
    rewrite(tmp_path / "out" / "suspects.csv", rows)
    table = ["--table", str(tmp_path / "out" / "suspects.csv"), "--out", str(tmp_path / "new")]
    fails(["shards", "correct", str(shards / "*.tar"), *table], capsys, *words)
    assert not (tmp_path / "new").exists()
