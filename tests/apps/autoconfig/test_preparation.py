"""Pairs in any form become shards, with some pairs held out from training."""

import csv
import shutil
from pathlib import Path

import pytest

from mmssl.apps.autoconfig import preparation
from mmssl.apps.autoconfig.inputs import count_tokens, probe_pairs
from mmssl.apps.autoconfig.preparation import LEAST, held_out_fraction, is_shards, prepare, resolve_shards
from mmssl.config import HoldOutConfig
from mmssl.data import expand, iter_samples
from mmssl.data.sources.hold_out import is_held_out
from mmssl.errors import UserError
from tests.helpers.color_pairs import write_table
from tests.helpers.tiny_runs import write_pairs


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 pairs."""
    return write_table(tmp_path_factory.mktemp("table"))


def keys(spec: str | list[str] | None) -> set[str]:
    return {f"{s.shard} {s.key}" for s in iter_samples(expand(spec))} if spec is not None else set()


def test_a_table_is_packed_with_a_part_held_out(table: Path, tmp_path: Path) -> None:
    """Every pair is either trained on or held out, with its caption. A second call packs nothing and gives the same
    split, also in a folder whose name contains glob characters."""
    folder = tmp_path / "run [1]" / "shards"
    found = prepare(table, folder)
    train, held_out = keys(found.train), keys(found.held_out)
    assert (len(train), len(held_out)) == (found.pairs, found.held_out_pairs)
    assert len(train | held_out) == found.pairs + found.held_out_pairs == 40
    assert 0 < found.held_out_pairs <= 20
    captions = {s.fields["txt"] for s in iter_samples(expand(found.train))}
    assert all(" square, number " in caption for caption in captions)
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.tar")}
    assert prepare(table, folder) == found
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("*.tar")} == before


def test_a_folder_and_shards_of_the_same_pairs(table: Path, tmp_path: Path) -> None:
    """Images with .txt files are packed likewise; shards are used in place, and nothing is written."""
    for row in csv.DictReader(table.read_text(encoding="utf-8").splitlines()):
        image = tmp_path / "photos" / Path(row["image"]).name
        image.parent.mkdir(exist_ok=True)
        shutil.copy(table.parent / row["image"], image)
        image.with_suffix(".txt").write_text(row["caption"])
    found = prepare(tmp_path / "photos", tmp_path / "run", HoldOutConfig(share=0))
    assert (found.pairs, found.held_out, found.packed) == (40, None, True)
    before = sorted(tmp_path.rglob("*"))
    again = prepare(tmp_path / "run", tmp_path / "other", HoldOutConfig(share=0))
    assert (again.train, again.pairs, again.packed) == (str(tmp_path / "run"), 40, False)
    assert sorted(tmp_path.rglob("*")) == before
    assert resolve_shards(tmp_path / "run", tmp_path / "other") == [str(tmp_path / "run" / "train-00000.tar")]


def test_pairs_of_shards_are_held_out_one_by_one(tmp_path: Path) -> None:
    """Of two shards, pairs of both are held out and copied; the shards themselves stay as they are, and the rule says
    which pairs the training leaves out. A fraction and a group can be given, and nothing held out."""
    shards = str(write_pairs(tmp_path) / "*.tar")
    found = prepare(shards, tmp_path / "run")
    assert (found.train, found.pairs + found.held_out_pairs, found.packed) == (shards, 48, False)
    held_out = keys(found.held_out)
    rows = [sample for sample in iter_samples(expand(shards)) if is_held_out(sample, found.rule)]
    assert {row.key for row in rows} == {key.split()[1] for key in held_out}
    assert len({row.shard for row in rows}) == 2
    assert (len(rows), found.rule.share) == (found.held_out_pairs, 0.25)
    classes = prepare(shards, tmp_path / "grouped", HoldOutConfig(share=0.5, group="cls"))
    labels = {s.fields["cls"] for s in iter_samples(expand(str(classes.held_out)))}
    assert classes.held_out_pairs == sum(s.fields["cls"] in labels for s in iter_samples(expand(shards)))
    none = prepare(shards, tmp_path / "none", HoldOutConfig(share=0))
    assert (none.held_out, none.pairs) == (None, 48)
    assert not (tmp_path / "none").exists()


def test_of_very_many_pairs_whole_shards_are_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of twenty shards some are held out: a tenth of the pairs, at most a quarter; of two shards none, with the
    reason."""
    monkeypatch.setattr(preparation, "MOST_KEYS", 40)
    pairs = write_pairs(tmp_path)
    few = prepare(str(pairs / "*.tar"), tmp_path / "x")
    assert (few.held_out, few.pairs) == (None, 48)
    assert "none" in few.why
    for number in range(2, 20):
        shutil.copy(pairs / "0.tar", pairs / f"{number}.tar")
    many = prepare([str(pairs / "*.tar")], tmp_path / "x")
    assert many.pairs + many.held_out_pairs == 20 * 24
    assert 0.1 <= many.held_out_pairs / (20 * 24) <= 0.25
    assert not keys(many.train) & keys(many.held_out)
    assert len(keys(many.train) | keys(many.held_out)) == 20 * 24
    assert many.rule.share == 0


def test_pairs_of_one_image_stay_together(table: Path, tmp_path: Path) -> None:
    """An image with several captions is either trained on or held out, with all its captions."""
    rows = list(csv.DictReader(table.read_text(encoding="utf-8").splitlines()))
    path = table.parent / "captions.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        writer.writerows([row["image"], f"{row['caption']}, caption {n}"] for n in range(5) for row in rows)
    found = prepare(path, tmp_path)
    parts = [{s.image for s in iter_samples(expand(p))} for p in (found.train, str(found.held_out))]
    assert not parts[0] & parts[1]
    assert found.pairs == 5 * len(parts[0])
    assert found.held_out_pairs == 5 * len(parts[1])


@pytest.mark.parametrize("pairs", [8, 40, 200, 1000, 10_000, 10_000_000])
def test_the_held_out_fraction(pairs: int) -> None:
    """A tenth, but at least 36 pairs, at most 5,000, and never more than a quarter."""
    share = held_out_fraction(pairs)
    assert share * pairs == pytest.approx(min(pairs / 4, min(5000, max(36, pairs / 10))))


def test_shards_are_recognised(table: Path, tmp_path: Path) -> None:
    """Patterns, lists and folders of tars are shards; tables and other folders are not."""
    (tmp_path / "0.tar").touch()
    assert all(is_shards(data) for data in ("a/*.tar", ["a.tar"], tmp_path, "s3://b/{0..9}.tar"))
    assert not any(is_shards(data) for data in (table, str(table.parent), "missing.csv", "x.parquet"))


def test_unusable_data_are_refused(table: Path, tmp_path: Path) -> None:
    """Each mistake is reported in one line with its place: a missing file or column, an empty table or folder, missing
    images, too few pairs. Of several unusable pairs the first is named."""

    def refused(data: Path | str, *words: str) -> None:
        with pytest.raises(UserError) as caught:
            prepare(data, tmp_path / f"out-{abs(hash(str(data)))}")
        assert "\n" not in str(caught.value)
        assert [word for word in words if word not in str(caught.value)] == []

    def written(name: str, *lines: str) -> Path:
        path = tmp_path / name
        path.write_text("\n".join(lines) + "\n")
        return path

    refused("nothing.csv", "nothing.csv", "does not exist")
    refused("photoos", "photoos does not exist", "a folder of images", ".csv", str(Path.cwd()))
    refused("pairs.cvs", "pairs.cvs does not exist", ".csv")
    refused("nothing/*.tar", "nothing/*.tar")
    refused(written("empty.csv", "image,caption"), "empty.csv", "no rows")
    refused(written("column.csv", "image,words", "a.png,b"), "caption column", "image, words")
    refused(written("gone.csv", "image,caption", "gone.png,a cat"), "gone.csv", "gone.png", "No such file")
    refused(written("few.csv", "image,caption", *(f"{table.parent}/photos/{i}.png,x" for i in range(5))), f"{LEAST}")
    (tmp_path / "void").mkdir()
    refused(tmp_path / "void", "void", "no image")
    images = [f"{table.parent}/photos/{i}.png,a cat {i}" for i in range(20)]
    found = prepare(written("some.csv", "image,caption", "gone.png,x", *images), tmp_path / "some")
    assert found.pairs + found.held_out_pairs == 20
    assert found.account.used == 20
    assert "gone.png" in " ".join(found.account.causes())


def test_probing_gives_lengths_and_sizes(table: Path, tmp_path: Path) -> None:
    """Captions of five words and images of 20 px on the shorter side; scripts without spaces count characters."""
    found = prepare(table, tmp_path)
    seen = probe_pairs(expand(found.train), found.pairs)
    assert (seen.count, seen.image_side, seen.caption_tokens) == (
        found.pairs,
        20,
        count_tokens("a red square, number 1"),
    )
    assert count_tokens("一只猫 cat") == 3 + 2
    with pytest.raises(UserError, match="no usable pair"):
        probe_pairs([str(write_empty(tmp_path / "empty.tar"))], 0)


def write_empty(path: Path) -> Path:
    """A tar without members."""
    path.write_bytes(bytes(10240))
    return path


def test_options_of_tables_are_used(table: Path, tmp_path: Path) -> None:
    """Columns, separator and encoding can be given, and are described as used. Shards refuse them."""
    rows = list(csv.DictReader(table.read_text(encoding="utf-8").splitlines()))
    path = table.parent / "odd.csv"
    lines = [f"{row['image']}~wrong~café {row['caption']}" for row in rows]
    path.write_bytes("\n".join(["photo~caption~words", *lines]).encode("cp1252"))
    options = {"image_column": "photo", "caption_column": "words", "separator": "~", "encoding": "cp1252"}
    found = prepare(path, tmp_path / "a", table=options)
    assert found.account.used == found.pairs + found.held_out_pairs == 40
    assert all(s.fields["txt"].startswith("café a ") for s in iter_samples(expand(found.train)))
    assert "windows-1252, image column 'photo', caption column 'words', 40 rows" in found.recognised
    with pytest.raises(UserError, match="--separator ~ is for tables"):
        prepare(str(write_pairs(tmp_path) / "*.tar"), tmp_path / "b", table={"separator": "~"})
