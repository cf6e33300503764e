"""Members with names of their own: mapped alike by check, index, show, pack, training and embedding."""

import json
from pathlib import Path

import pytest

from mmssl.cli.main import main
from mmssl.config import parse_config
from mmssl.data import MemberNames, iter_samples
from mmssl.data.packing import ShardRecords
from mmssl.data.shards import SampleLimits, image_ranges, index_shards
from mmssl.data.shards.samples import parse_sample
from mmssl.data.storage import LocalFiles
from mmssl.train import train
from tests.helpers.images import encode, photo
from tests.helpers.tars import File, tar_bytes
from tests.helpers.tiny_runs import run_tree, write_pairs

IMAGE = encode(photo(24, 24), "PNG")
KINDS = {
    "extensions": ("{}.img_content", "{}.caption", "img_content", "caption"),
    "dotted": ("{}.input.jpg", "{}.output.txt", "input.jpg", ".Output.txt"),
    "keys with dots": ("a.{}.v1.input.jpg", "a.{}.v1.output.txt", "input.jpg", "output.txt"),
    "folders": ("{}/image.jpg", "{}/caption.txt", "image.jpg", "caption.txt"),
    "image only": ("{}.dat", "{}.txt", "dat", ""),
    "caption only": ("{}.png", "{}.prompt", "", "prompt"),
    "beside usual ones": ("{}.large.png", "{}.long.txt", "large.png", "long.txt"),
}


def shard(path: Path, kind: str, count: int = 12) -> tuple[str, SampleLimits, list[str]]:
    """A shard of a kind, the limits that map its members, and the options of the commands that do."""
    image, text, image_name, text_name = KINDS[kind]
    files: list[File] = []
    for i in range(count):
        files += [(image.format(i), IMAGE), (text.format(i), f"caption {i}".encode())]
        if kind == "beside usual ones":
            files += [(f"{i}.png", b"small"), (f"{i}.txt", b"short")]
        files.append((f"{i}/info.name" if kind == "folders" else f"{image.format(i).partition('.')[0]}.img_name", b"x"))
    path.write_bytes(tar_bytes(files))
    names = MemberNames.of([image_name] if image_name else [], [text_name] if text_name else [])
    options = ["--image-member", image_name] * bool(image_name) + ["--caption-member", text_name] * bool(text_name)
    return str(path), SampleLimits(members=names), options


@pytest.mark.parametrize("kind", list(KINDS))
def test_mapped_members_are_read_alike(tmp_path: Path, kind: str) -> None:
    """By range, in order, packed again and for images alone: every image with the caption of its own sample."""
    name, limits, _ = shard(tmp_path / "x.tar", kind)
    expected = [(IMAGE, f"caption {i}") for i in range(12)]
    (index,) = index_shards([name], limits)
    files = LocalFiles()
    read = [
        parse_sample(0, name, files.read(name, int(a), int(b)), limits) for a, b in zip(*index.ranges(), strict=True)
    ]
    files.close()
    assert [(sample.image, sample.fields["txt"]) for sample in read] == expected
    assert [(sample.image, sample.fields["txt"]) for sample in iter_samples([name], limits)] == expected
    assert [(image, f["txt"]) for (image,), f in map(ShardRecords([name], limits).load, range(12))] == expected
    status = Path(name).stat()
    found = image_ranges(name, status.st_mtime_ns, status.st_size, limits.members)
    assert [Path(name).read_bytes()[start : start + size] for start, size in found.values()] == [IMAGE] * 12


def test_an_index_of_other_names_is_made_again(tmp_path: Path) -> None:
    """Mapped or not, the index is that of the names given now."""
    name, limits, _ = shard(tmp_path / "x.tar", "extensions")
    counts = [index_shards([name], given)[0].samples for given in (limits, SampleLimits(), limits, limits)]
    assert counts == [12, 0, 12, 12]


@pytest.mark.parametrize("kind", ["extensions", "folders"])
def test_the_commands_map_members(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """check, index, show and pack take the same two options."""
    name, _, options = shard(tmp_path / "x.tar", kind)
    report = tmp_path / "report.json"
    for words in (
        ["check", name, "--json", str(report)],
        ["index", name],
        ["show", name, "--out", str(tmp_path / "sheet.png")],
        ["pack", name, "--out", str(tmp_path / "out")],
    ):
        with pytest.raises(SystemExit) as caught:
            main(["shards", *words, *options])
        assert not caught.value.code
    assert capsys.readouterr().out.count("12 pairs offered = 12 used + 0 left out") == 3
    assert json.loads(report.read_text())["samples"]["usable"] == 12
    assert len(list(iter_samples([str(tmp_path / "out" / "train-00000.tar")]))) == 12


def test_training_maps_members(tmp_path: Path) -> None:
    """`data.members` is enough for a run, its tokenizer included."""
    name, _, _ = shard(tmp_path / "x.tar", "extensions", 16)
    (tmp_path / "pairs").mkdir()
    tree = run_tree(write_pairs(tmp_path / "pairs"), tmp_path / "run", train__steps=2)
    tree["data"] |= {"train": name, "members": {"image": ["img_content"], "caption": ["caption"]}}
    tree["evaluate"] = {}
    train(parse_config(tree, "test"))
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    assert not (tmp_path / "run" / "bad_samples.jsonl").exists()
