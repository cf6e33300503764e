"""`mmssl shards`: each verb on shards with known faults, and one line for each mistake."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmssl.build import train_tokenizer_on
from mmssl.data import expand, iter_samples
from mmssl.data.transforms.captions import render_caption
from tests.cli.test_main import fails, main_ok
from tests.data.health.test_duplicates import copies, images
from tests.helpers.images import encode, photo
from tests.helpers.tars import tar_bytes
from tests.helpers.tiny_runs import write_pairs


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command that succeeds prints."""
    capsys.readouterr()
    main_ok(["shards", *arguments])
    return capsys.readouterr().out


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """48 sound pairs in two shards, and a third that is cut: five pairs, one without caption, one broken, one cut."""
    folder = write_pairs(tmp_path)
    image = encode(photo(40, 40), "JPEG")
    files = [f for i in range(4) for f in ((f"c{i}.jpg", image), (f"c{i}.txt", b"a red fox"))]
    files += [("d.jpg", image), ("e.jpg", b"junk"), ("e.txt", b"junk"), ("f.txt", b"cut"), ("f.jpg", image)]
    whole = tar_bytes(files).rstrip(b"\0")
    (folder / "2.tar").write_bytes(whole[: len(whole) - 100])
    return folder


def test_index_counts_and_names_what_is_lost(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The index lies beside the shards, and the output says how many samples there are and what is wrong."""
    out = run(["index", str(shards / "*.tar")], capsys)
    assert "3 shards, 53 samples" in out
    assert "1 damaged shard:" in out
    assert "1 left out: no text, for example" in out
    assert "2.tar:d (no text)" in out
    assert "55 pairs offered = 53 used + 2 left out (.jpg is cut: 1; no text: 1)" in out
    offsets = np.fromfile(shards / "0.tar.idx", dtype="<u8")
    with tarfile.open(shards / "0.tar") as tar:
        starts = [member.offset for member in tar if member.name.endswith(".png")]
    assert offsets[:-1].tolist() == starts
    entries = json.loads((shards / "mmssl-index.json").read_text())["shards"]
    assert {name: entry["samples"] for name, entry in entries.items()} == {"0.tar": 24, "1.tar": 24, "2.tar": 5}
    before = (shards / "0.tar.idx").stat().st_mtime_ns
    run(["index", str(shards)], capsys)
    assert (shards / "0.tar.idx").stat().st_mtime_ns == before, "what is there and fits is not made again"


def test_check_reports_faults_and_ends_with_what_to_fix(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Losses are counted by reason, copies are found, advice closes the report; JSON and image are written."""
    figures, image = tmp_path / "health.json", tmp_path / "health.png"
    out = run(["check", str(shards / "*.tar"), "--json", str(figures), "--image", str(image)], capsys)
    report = json.loads(figures.read_text())
    assert report["samples"]["usable"] == 52
    assert report["samples"]["left out"]["no text"] == 1
    assert len(report["samples"]["damaged shards"]) == 1
    assert report["images"]["exact copies"] == 3
    assert report["captions"]["no masked word at a rate of 0.15"] > 0
    assert report["batches"]["samples that meet a copy"] >= 4 / 52
    tail = out[out.index("what to fix") :]
    assert tail.count("\n  ") == len(report["advice"])
    assert "damaged" in tail
    assert image.read_bytes().startswith(b"\x89PNG")
    assert '"usable": 10' in _json(["check", str(shards / "0.tar"), "--first", "10"], tmp_path / "few.json", capsys)


def test_check_measures_captions_in_tokens(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a tokenizer lengths are tokens, and a small limit cuts captions."""
    main_ok(["tokenizer", "train", str(shards / "0.tar"), "--out", str(tmp_path / "tok"), "--vocab-size", "80"])
    options = ["--tokenizer", str(tmp_path / "tok"), "--max-tokens", "4"]
    report = json.loads(_json(["check", str(shards / "0.tar"), *options], tmp_path / "tokens.json", capsys))
    assert report["captions"]["cut"] == 1
    assert "tokens, quantiles 1 50 99 %" in report["captions"]


def test_check_learns_a_tokenizer_like_training(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --tokenizer captions are measured with one that training would learn from them."""
    names, captions = [str(shards / "0.tar")], ["{txt}"]
    report = json.loads(
        _json(["check", *names, "--max-tokens", "5", "--vocab-size", "500"], tmp_path / "r.json", capsys)
    )
    texts = [render_caption(sample.fields, captions, None) for sample in iter_samples(names)]
    lengths = train_tokenizer_on(names, captions, 500, 5).measure(texts).lengths
    assert report["captions"]["cut"] == pytest.approx(np.mean([length > 5 for length in lengths]))
    assert report["captions"]["unknown tokens"] == 0


def test_show_draws_a_sheet_or_tells_of_one_sample(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The sheet is as wide as its columns; a sample is found by its key and described with all of its fields."""
    sheet = tmp_path / "sheet.png"
    out = run(
        ["show", str(shards / "*.tar"), "--count", "7", "--columns", "3", "--side", "50", "--out", str(sheet)], capsys
    )
    assert out.strip() == str(sheet)
    with Image.open(sheet) as drawn:
        assert drawn.width == 3 * (50 + 8) + 8
    out = run(["show", str(shards / "*.tar"), "--key", "c2"], capsys)
    assert "2.tar:c2" in out
    assert "JPEG, 40 x 40 pixels" in out
    assert 'txt: "a red fox"' in out
    assert not list(Path.cwd().glob("sheet.png"))


def test_pack_makes_shards_that_check_and_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder becomes indexed shards in splits, shrunk; what is unusable is named; a second call makes nothing new."""
    source, out = tmp_path / "photos", tmp_path / "shards"
    source.mkdir()
    for i in range(30):
        (source / f"{i:02}.jpg").write_bytes(encode(photo(80, 60), "JPEG"))
        (source / f"{i:02}.txt").write_text(f"photo {i}")
    (source / "bare.jpg").write_bytes(encode(photo(8, 8), "JPEG"))
    options = ["--split", "train=0.8", "--split", "val=0.2", "--shard-samples", "10", "--resize", "32"]
    printed = run(["pack", str(source), "--out", str(out), *options], capsys)
    names = {}
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                names[member.name] = path.name.split("-")[0]
                if member.name.endswith(".jpg"):
                    content = tar.extractfile(member)
                    assert content is not None
                    assert min(Image.open(io.BytesIO(content.read())).size) == 32
    assert len(names) == 60
    assert set(names.values()) == {"train", "val"}
    assert "1 left out" in printed
    assert "bare" in (out / "bad_samples.jsonl").read_text()
    assert (out / "train-00000.tar.idx").is_file()
    again = run(["pack", str(source), "--out", str(out), *options], capsys)
    assert f"{len(list(out.glob('*.tar')))} shards existed already" in again


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["index", "{here}/none-*.tar"], ["none-*.tar"]),
        (["index", "pipe:cat x"], ["pipe:cat x"]),
        (["check", "{here}/none.tar"], ["none.tar", "does not exist"]),
        (["check", "{here}/0.tar", "--json", "{here}/none/x.json"], ["none/x.json", "cannot be written"]),
        (["check", "{here}/0.tar", "--caption", "{{txt"], ["malformed"]),
        (["check", "{here}/0.tar", "--tokenizer", "{here}/none"], ["no tokenizer folder"]),
        (["show", "{here}/0.tar", "--key", "nothing"], ["'nothing'", "keys look like"]),
        (["show", "{here}/0.tar", "--out", "{here}"], ["cannot be written"]),
        (["pack", "{here}/none", "--out", "{here}/out"], ["none", "does not exist"]),
        (["pack", "{here}/photos", "--out", "{here}/out", "--split", "train"], ["--split train", "NAME=FRACTION"]),
        (["pack", "{here}/photos", "--out", "{here}/out", "--format", "gif"], ["'gif'", "webp"]),
        (
            ["pack", "{here}/photos", "--out", "{here}/o", "--split", "a=1", "--split-by", "x"],
            ["--split-by", "give one"],
        ),
        (["pack", "{here}/photos", "--out", "{here}/o", "--split-by", "x"], ["photos has no field 'x'"]),
        (["pack", "{here}/photos", "--out", "{here}"], ["contains shards of other records"]),
    ],
)
def test_mistakes_end_in_one_line(
    arguments: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is named with what to do, exits with 2, and writes nothing."""
    write_pairs(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(encode(photo(8, 8), "PNG"))
    (tmp_path / "photos" / "a.txt").write_text("a")
    fails(["shards", *(a.format(here=tmp_path) for a in arguments)], capsys, *words)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """A folder of 20 photographs, each in four forms that are copies or near copies: N-0.png to N-3.png."""
    source = tmp_path / "album"
    source.mkdir()
    for number, photograph in enumerate(images()):
        for form, copy in enumerate(copies(photograph)):
            copy.save(source / f"{number:02}-{form}.png")
            (source / f"{number:02}-{form}.txt").write_text(f"photograph {number}, form {form}")
    return source


def photographs(pattern: Path) -> list[str]:
    """Numbers of the photographs in shards, sorted."""
    return sorted(sample.key[:2] for sample in iter_samples(expand([str(pattern)]), need_text=False))


def test_copies_in_two_splits_are_found_and_left_out(
    album: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`check --against` counts images with a copy in the other split. With --without-leaks `pack` leaves them out of
    the larger one and lists each with its copy, after an interruption too."""
    splits = ["--split", "train=0.7", "--split", "val=0.3", "--shard-samples", "20"]
    run(["pack", str(album), "--out", str(tmp_path / "a"), *splits], capsys)
    train, val = photographs(tmp_path / "a" / "train-*.tar"), photographs(tmp_path / "a" / "val-*.tar")
    leaking = sum(number in set(val) for number in train)
    arguments = ["check", str(tmp_path / "a" / "train-*.tar"), "--against", str(tmp_path / "a" / "val-*.tar")]
    found = json.loads(_json(arguments, tmp_path / "a.json", capsys))
    assert found["against"]["exact copies"] + found["against"]["near copies"] == leaking > 20
    assert found["against"]["images compared with"] == len(val)
    assert any(f"{leaking} images are copies" in line for line in found["advice"])
    pack = ["pack", str(album), "--out", str(tmp_path / "b"), *splits, "--without-leaks"]
    printed = run(pack, capsys)
    clean = photographs(tmp_path / "b" / "train-*.tar")
    assert photographs(tmp_path / "b" / "val-*.tar") == val
    assert clean == [number for number in train if number not in set(val)]
    assert f"{leaking} left out" in printed
    left_out = [json.loads(line) for line in (tmp_path / "b" / "bad_samples.jsonl").read_text().splitlines()]
    assert all(line["key"][:2] == line["error"].rpartition(":")[2][:2] for line in left_out)
    first = next((tmp_path / "b").glob("train-*.tar"))
    content = first.read_bytes()
    first.unlink()
    run(pack, capsys)
    assert first.read_bytes() == content
    fails(["shards", *pack[:-1]], capsys, "contains shards of other records or options")


def test_copies_of_given_shards_are_left_out(album: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With --without-copies-of, no image is packed that has a copy in the given shards, captions or not."""
    files = [(f"{n:02}.png", (album / f"{n:02}-1.png").read_bytes()) for n in range(5)]
    (tmp_path / "test.tar").write_bytes(tar_bytes(files))
    run(["pack", str(album), "--out", str(tmp_path / "c"), "--without-copies-of", str(tmp_path / "test.tar")], capsys)
    assert photographs(tmp_path / "c" / "*.tar") == [f"{n:02}" for n in range(5, 20) for _ in range(4)]


def _json(arguments: list[str], file: Path, capsys: pytest.CaptureFixture[str]) -> str:
    run([*arguments, "--json", str(file)], capsys)
    return file.read_text()
