"""The table that opens docs/data.md: what it says to type works for what it says you have, line by line."""

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmssl.data import iter_samples
from tests.helpers import docs_commands as commands
from tests.helpers.docs_blocks import ROOT
from tests.helpers.images import encode
from tests.helpers.tars import File, tar_bytes

PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
ROWS = [row.strip("| ").split(" | ") for row in PAGE.split("| --- | --- |\n")[1].split("\n\n")[0].splitlines()]
COUNT = 12
CAPTIONS = [f"a thing of number {n}, rather small" for n in range(COUNT)]


def image(number: int) -> bytes:
    """A small image unlike the others."""
    return encode(Image.new("RGB", (16, 12), (number * 20, 99, 255 - number * 20)), "PNG")


def put(path: Path, content: bytes | str) -> None:
    """A file, with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def write_images(folder: Path, captions: bool) -> None:
    """The images, perhaps with their captions: half of them in a .txt, half in a .json."""
    for n, caption in enumerate(CAPTIONS):
        put(folder / f"{n}.png", image(n))
        if captions and n % 2:
            put(folder / f"{n}.txt", caption)
        elif captions:
            put(folder / f"{n}.json", json.dumps({"caption": caption}))


def table(separator: str, names: str, rows: list[str]) -> str:
    """A table; quotes enclose captions."""
    return "\n".join([names.replace(",", separator), *(row.replace("~", separator) for row in rows)])


def write_dataset() -> None:
    for n, caption in enumerate(CAPTIONS):
        put(Path(f"dataset/{'val' if n < 3 else 'train'}/cats/{n}.png"), image(n))
        put(Path(f"dataset/{'val' if n < 3 else 'train'}/cats/{n}.txt"), caption)


def write_apart() -> None:
    for n, caption in enumerate(CAPTIONS):
        put(Path(f"apart/images/{n}.png"), image(n))
        put(Path(f"apart/captions/{n}.txt"), caption)


def write_flickr() -> None:
    write_images(Path("flickr8k/Images"), captions=False)
    rows = [f"{n}.png~{caption}" for n, caption in enumerate(CAPTIONS)]
    put(Path("flickr8k/captions.txt"), table(",", "image,caption", rows))


def write_imagefolder() -> None:
    write_images(Path("imagefolder/cats"), captions=False)
    rows = [json.dumps({"file_name": f"{n}.png", "text": caption}) for n, caption in enumerate(CAPTIONS)]
    put(Path("imagefolder/cats/metadata.jsonl"), "\n".join(rows))


def write_pairs() -> None:
    """pairs.csv with a split and a patient for each row; other forms of the same table lie beside it."""
    write_images(Path(), captions=False)
    rows = [f'{n}.png~"{c}"~{"val" if n < 3 else "train"}~p{n // 2}' for n, c in enumerate(CAPTIONS)]
    put(Path("pairs.csv"), table(",", "image,caption,split,patient", rows))
    plain = [row.replace('"', "") for row in rows]
    put(Path("pairs.tsv.gz"), gzip.compress(table("\t", "image,caption,split,patient", plain).encode()))


def write_words() -> None:
    write_images(Path(), captions=False)
    put(Path("words.csv"), table(",", "photo,words", [f'{n}.png~"{caption}"' for n, caption in enumerate(CAPTIONS)]))


def write_odd() -> None:
    write_images(Path(), captions=False)
    rows = [f"{n}.png~{caption}" for n, caption in enumerate(CAPTIONS)]
    put(Path("table.txt"), table(";", "image,caption", rows).encode("cp1252"))


def write_parquet(path: str, numbers: range) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    columns = {"image": [image(n) for n in numbers], "caption": [CAPTIONS[n] for n in numbers]}
    pq.write_table(pa.table(columns), path)


def write_parts() -> None:
    for part in range(3):
        write_parquet(f"parts/train-{part}.parquet", range(4 * part, 4 * part + 4))
    write_parquet("parts/test-0.parquet", range(2))


def write_coco() -> None:
    write_images(Path("train2017"), captions=False)
    images = [{"id": n, "file_name": f"{n}.png"} for n in range(COUNT)]
    notes = [{"id": 99 - n, "image_id": n, "caption": caption} for n, caption in enumerate(CAPTIONS)]
    put(Path("captions_train2017.json"), json.dumps({"images": images, "annotations": notes, "info": {}}))


def write_saved() -> None:
    Path("saved").mkdir()
    rows = pa.table({"image": [{"bytes": image(n), "path": None} for n in range(COUNT)], "text": CAPTIONS})
    with pa.ipc.new_stream("saved/data-00000-of-00001.arrow", rows.schema) as writer:
        writer.write_table(rows)
    put(Path("saved/state.json"), json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))


def write_old() -> None:
    files: list[File] = [(f"images/{n}.png", image(n)) for n in range(COUNT)]
    files += [(f"texts/{n}.txt", caption.encode()) for n, caption in enumerate(CAPTIONS)]
    put(Path("old/0.tar"), tar_bytes([*files, ("empty.png", image(0)), ("empty.txt", b"")]))


STAGES: dict[str, Callable[[], None]] = {
    "photos/": lambda: write_images(Path("photos"), captions=True),
    "dataset/": write_dataset,
    "apart/": write_apart,
    "flickr8k/": write_flickr,
    "imagefolder/": write_imagefolder,
    "pairs.csv": write_pairs,
    "words.csv": write_words,
    "table.txt": write_odd,
    "pairs.parquet": lambda: write_parquet("pairs.parquet", range(COUNT)),
    "'parts/train-*.parquet'": write_parts,
    "captions_train2017.json": write_coco,
    "saved/": write_saved,
    "'old/*.tar'": write_old,
}
PACKED = [re.findall(r"`(mmssl shards pack [^`]+)`", what)[0] for _, what in ROWS if "`mmssl shards pack" in what]


@pytest.mark.parametrize("line", PACKED)
def test_what_to_type_packs_what_you_have(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line of the page makes shards with all twelve pairs, each image with its own caption, in the right split."""
    monkeypatch.chdir(tmp_path)
    STAGES[next(name for name in STAGES if f" {name} " in line)]()
    commands.run(line)
    splits = {path.name[:-10]: list(iter_samples([str(path)])) for path in sorted(Path("packed").glob("*.tar"))}
    pairs = {sample.image: sample.fields["txt"] for samples in splits.values() for sample in samples}
    assert pairs == {image(n): caption for n, caption in enumerate(CAPTIONS)}
    if "--split-by" in line:
        assert {sample.fields["txt"] for sample in splits["val"]} == set(CAPTIONS[:3])
    if "--group-by" in line:
        groups = [{sample.fields["patient"] for sample in samples} for samples in splits.values()]
        assert sum(map(len, groups)) == len(set.union(*groups)) == COUNT // 2


def test_every_line_of_the_table_is_tested() -> None:
    """Lines without a command to pack are these; every stage has a line."""
    others = [what for _, what in ROWS if "`mmssl shards pack" not in what]
    assert [re.sub(r"[^\w ].*", "", what.strip("`")) for what in others] == [
        "img2dataset",
        "nothing",
        "mmssl shards index ",
        "mmssl train ",
    ]
    assert all(any(f" {stage} " in line for line in PACKED) for stage in STAGES)


@pytest.mark.parametrize("suffix", [".tsv.gz", ".txt", ".jsonl", ".json"])
def test_tables_of_every_suffix_pack(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The suffixes that the page names."""
    monkeypatch.chdir(tmp_path)
    write_pairs()
    rows = [{"image": f"{n}.png", "caption": caption} for n, caption in enumerate(CAPTIONS)]
    contents = {
        ".txt": Path("pairs.csv").read_text(),
        ".jsonl": "\n".join(map(json.dumps, rows)),
        ".json": json.dumps(rows),
    }
    if suffix in contents:
        put(Path(f"pairs{suffix}"), contents[suffix])
    commands.run(f"mmssl shards pack pairs{suffix} --out packed")
    samples = iter_samples(["packed/train-00000.tar"])
    assert {s.image: s.fields["txt"] for s in samples} == {image(n): caption for n, caption in enumerate(CAPTIONS)}


@pytest.mark.slow
def test_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`mmssl train --data pairs.csv` packs, chooses and trains, and says what became of the pairs."""
    monkeypatch.chdir(tmp_path)
    write_pairs()
    line = next(what.strip("`") for _, what in ROWS if "`mmssl train" in what)
    commands.run(f"{line} run_dir=run train.steps=1")
    assert "12 pairs offered = 12 used + 0 left out" in capsys.readouterr().out
    assert (tmp_path / "run" / "model").is_dir()
