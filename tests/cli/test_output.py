"""What the command line prints and draws in any terminal, for captions in any script."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmssl.cli.main import main
from mmssl.data.health.browse import SheetEntry, contact_sheet
from mmssl.plotting import has_font
from tests.cli.test_main import fails
from tests.helpers.images import encode, photo
from tests.helpers.tars import tar_bytes


def shard(path: Path, caption: str) -> str:
    """Twelve pairs with one caption, in JSON, since it may hold half a surrogate pair."""
    image = encode(photo(24, 24), "PNG")
    content = json.dumps({"caption": caption}).encode()
    path.write_bytes(tar_bytes(f for i in range(12) for f in ((f"{i:02}.png", image), (f"{i:02}.json", content))))
    return str(path)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8", "latin-1", "cp437"])
@pytest.mark.parametrize("caption", ["café \U0001f389", "一只猫", "half \ud83d", "“quoted” – Привет"])
def test_no_terminal_stops_a_report(
    tmp_path: Path, encoding: str, caption: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Letters that the terminal lacks are printed as escapes; the report and its files are complete."""
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", out)
    name, report = shard(tmp_path / "x.tar", caption), tmp_path / "report.json"
    for words in (["check", name, "--json", str(report)], ["show", name, "--key", "00"], ["index", name]):
        with pytest.raises(SystemExit) as caught:
            main(["shards", *words])
        assert not caught.value.code
    out.flush()
    printed = out.buffer.getvalue().decode(encoding)
    assert "12 pairs offered = 12 used + 0 left out" in printed
    assert json.loads(report.read_text(encoding="utf-8"))["samples"]["usable"] == 12


@pytest.mark.parametrize("letters", ["éü", "Ωμ", "Жя", "ẵ"])
def test_contact_sheets_draw_letters_of_other_scripts(letters: str) -> None:
    """Two letters of a script look different from each other and from the box for unknown letters."""

    def drawn(text: str) -> bytes:
        sheet = contact_sheet([SheetEntry(np.zeros((8, 8, 3), np.uint8), text)], columns=1, side=64)
        return np.asarray(sheet.crop((0, 72, sheet.width, sheet.height))).tobytes()

    looks = [drawn(letter) for letter in (*letters, "\ue000")]
    assert len(set(looks)) == len(looks)
    assert has_font(letters)
    assert not has_font("\ue000")


def test_commands_that_find_nothing_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """index, check and pack with no usable pair exit with 2 and say so; nothing is called ready to train."""
    empty = tmp_path / "x.tar"
    empty.write_bytes(tar_bytes([("a.png", b"x"), ("b.txt", b"y")]))
    fails(["shards", "index", str(empty)], capsys, "no sample of", "is usable")
    fails(["shards", "check", str(empty)], capsys, "no sample of", "is usable")
    fails(["shards", "pack", str(empty), "--out", str(tmp_path / "a")], capsys, "no pair of", "is usable")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(encode(photo(8, 8), "PNG"))
    fails(["shards", "pack", str(tmp_path / "in"), "--out", str(tmp_path / "b")], capsys, "no pair of", "is usable")
    assert not list(tmp_path.glob("[ab]/*.tar"))


def test_pack_reads_a_pattern_of_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A glob of shards packs into new ones, without the samples that cannot be used."""
    for number in range(3):
        shard(tmp_path / f"{number}.tar", f"caption {number}" if number else "")
    with pytest.raises(SystemExit) as caught:
        main(["shards", "pack", f"{tmp_path}/*.tar", "--out", str(tmp_path / "out")])
    assert not caught.value.code
    assert "36 pairs offered = 24 used + 12 left out (the caption is empty: 12)" in capsys.readouterr().out
    with Image.open(io.BytesIO(photo_of(tmp_path / "out" / "train-00000.tar"))) as image:
        assert image.size == (24, 24)


def test_pack_counts_captions_that_training_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A caption that is too long for training is packed, and said to be so; a text of many lines is many captions."""
    (tmp_path / "in").mkdir()
    for name, text in (("long", "word " * 6000), ("lines", "a line\n" * 6000), ("usual", "a red fox")):
        (tmp_path / "in" / f"{name}.png").write_bytes(encode(photo(8, 8), "PNG"))
        (tmp_path / "in" / f"{name}.txt").write_text(text)
    with pytest.raises(SystemExit) as caught:
        main(["shards", "pack", str(tmp_path / "in"), "--out", str(tmp_path / "out")])
    assert not caught.value.code
    out = capsys.readouterr().out
    assert "1 caption of more than 20,000 characters: training leaves these pairs out" in out
    assert "3 used" in out


def photo_of(path: Path) -> bytes:
    """The first image of a shard."""
    import tarfile

    with tarfile.open(path) as tar:
        member = next(member for member in tar if member.name.endswith(".png"))
        content = tar.extractfile(member)
        assert content is not None
        return content.read()
