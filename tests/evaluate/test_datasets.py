"""Datasets in every layout, and what is said of broken ones."""

from pathlib import Path
from typing import Any

import pytest

from mmssl.errors import UserError
from mmssl.evaluate import suite
from mmssl.evaluate.datasets import find_datasets, open_dataset, open_images, read, training_split
from mmssl.evaluate.labels import class_indices, image_captions, in_order, sample_label
from mmssl.types import Sample
from tests.helpers.toy_encoder import ToyEncoder, pack, paint


def sample(**fields: object) -> Sample:
    return Sample(id=0, shard="some/test/0.tar", key="00000", image=b"", fields=dict(fields))


def test_clip_benchmark_layout(numbers: Path) -> None:
    """Shards come from nshards.txt, names and templates from the files beside; every sample is read once."""
    (numbers / "test" / "2.tar").write_bytes(b"not counted by nshards.txt")
    dataset = open_dataset(numbers)
    assert [Path(shard).name for shard in dataset.shards] == ["0.tar", "1.tar"]
    assert dataset.name == "numbers"
    assert dataset.kind == "classification"
    assert dataset.classnames is not None
    assert dataset.classnames[6] == "number 106"
    assert dataset.templates == ("a {c}", "an image of the {c}.")
    samples = list(read(dataset, on_bad=pytest.fail))
    assert len({s.id for s in samples}) == 40
    assert class_indices(dataset, samples)[1].tolist() == [i % 6 for i in range(40)]


def test_retrieval_layout(captioned: Path) -> None:
    """dataset_type.txt makes it a retrieval set; captions are the lines of .txt."""
    dataset = open_dataset(captioned)
    assert dataset.kind == "retrieval"
    assert dataset.classnames is None
    assert [len(image_captions(s)) for s in read(dataset, on_bad=pytest.fail)] == [1 + i % 3 for i in range(30)]


@pytest.mark.parametrize(
    ("fields", "captions"),
    [
        ({"txt": "one\n\ntwo \n"}, ["one", "two"]),
        ({"txt": "one", "captions": ["one", "two"]}, ["one", "two"]),
        ({"txt": "one\nline", "captions": ["one\nline"]}, ["one\nline"]),
        ({"txt": "one", "captions": ["others", "two"]}, ["one"]),
    ],
)
def test_retrieval_has_every_caption(fields: dict[str, object], captions: list[str]) -> None:
    """The captions of an image are the lines of its text, or the list that packing wrote beside it."""
    assert image_captions(sample(**fields)) == captions


def test_flat_folder_and_pattern(tmp_path: Path) -> None:
    """A flat folder gives its val shards; a pattern gives what it names, with the names beside the shards."""
    home = tmp_path / "flat"
    for name in ("train-00000", "val-00000", "val-00001"):
        pack(home / f"{name}.tar", [{"png": paint(1), "cls": 0}])
    (home / "classnames.txt").write_text("one\ntwo\n")
    assert [Path(s).name for s in open_dataset(home).shards] == ["val-00000.tar", "val-00001.tar"]
    train = open_dataset(str(home / "train-*.tar"))
    assert train.name == "flat-train"
    assert train.classnames == ("one", "two")
    assert training_split(open_dataset(home)).shards == train.shards


def test_names_from_labels(tmp_path: Path) -> None:
    """Where a JSON entry holds the label, the classes are the distinct labels in order, numbers by their value."""
    records = [{"png": paint(i), "json": {"label": f"c{i % 3}", "group": i % 2}, "txt": "x"} for i in range(6)]
    shard = pack(tmp_path / "a-0.tar", records)
    dataset = open_dataset(shard)
    names, labels = class_indices(dataset, list(read(dataset, on_bad=pytest.fail)))
    assert names == ("c0", "c1", "c2")
    assert labels.tolist() == [0, 1, 2, 0, 1, 2]
    groups = open_dataset(shard, label="group")
    assert class_indices(groups, list(read(groups, on_bad=pytest.fail)))[0] == ("0", "1")
    assert in_order(["10", "b", "9", "-1", "10", "a", "9a"]) == ("-1", "9", "10", "9a", "a", "b")


def test_a_named_field_keeps_the_class_names(numbers: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A field of numbers or of known names is read with the class names beside the shards; one of other texts gives its
    own classes, and says so; a field with both is refused."""
    home, names = numbers, [f"number {100 + c}" for c in range(7)]
    values: dict[str, list[Any]] = {
        "index": [5, 0, 6],
        "name": ["number 102", "number 100", "number 102"],
        "camera": ["old", "new", "old"],
        "mixed": ["number 102", "new", "number 100"],
    }
    pack(home / "test" / "0.tar", [{"png": paint(1), "json": {f: v[i] for f, v in values.items()}} for i in range(3)])
    (home / "test" / "nshards.txt").write_text("1")
    found = {}
    for field in values:
        dataset = open_dataset(home, label=field)
        samples = list(read(dataset, on_bad=pytest.fail))
        if field == "mixed":
            with pytest.raises(UserError, match=r"label 'new' of 00001 .* is not among the 7 class names"):
                class_indices(dataset, samples)
        else:
            classes, indices = class_indices(dataset, samples)
            found[field] = (list(classes), indices.tolist())
    assert found == {"index": (names, [5, 0, 6]), "name": (names, [2, 0, 2]), "camera": (["new", "old"], [1, 0, 1])}
    assert "no value of 'camera' is in" in caplog.text


def test_numbers_are_no_class_names(numbers: Path) -> None:
    """Without class names, classification by prompts of numbers is refused; a classifier that is trained needs none."""
    (numbers / "classnames.txt").unlink()
    train = [{"png": paint(100 + i % 6, i), "cls": i % 6} for i in range(30)]
    pack(numbers / "train" / "0.tar", train)
    dataset = open_dataset(numbers, label="cls")
    with pytest.raises(UserError, match=r"no class names for the labels of x, which are numbers .*--classnames"):
        suite.run(ToyEncoder(), {"x": (dataset, "zero_shot")})
    assert suite.run(ToyEncoder(), {"x": (dataset, "knn")})["x/knn"]["acc1"] == 1


def write_image_folder(home: Path, layout: str) -> Path:
    """Painted numbers in a folder per class: `folders`, `splits` with train and val, or `table`, a CSV."""
    for split, count in (("train", 6), ("val", 3)):
        for number in (100, 101, 102):
            for variant in range(count):
                place = home / (split if layout == "splits" else "") / f"number_{number}"
                place.mkdir(parents=True, exist_ok=True)
                (place / f"{split}{variant}.png").write_bytes(paint(number, variant))
    if layout != "table":
        return home
    rows = [f"{path.relative_to(home)},number {path.parent.name[-3:]}" for path in sorted(home.rglob("*.png"))]
    (home / "labels.csv").write_text("\n".join(["filename,Category", *rows]))
    return home / "labels.csv"


@pytest.mark.parametrize(("layout", "samples"), [("folders", 27), ("splits", 9), ("table", 27)])
def test_labelled_images_need_no_shards(layout: str, samples: int, tmp_path: Path) -> None:
    """A folder per class, with or without splits, and a table with a column of labels are evaluated as they are: a
    perfect model is right everywhere, and broken images are left out."""
    source = write_image_folder(tmp_path / "zoo", layout)
    (next(iter(sorted((tmp_path / "zoo").rglob("*0.png"), reverse=True)))).write_bytes(b"broken")
    dataset = open_images(source)
    assert dataset is not None
    assert dataset.name == source.stem
    results = suite.run(ToyEncoder(), {"z": (dataset, ["zero_shot", *(["knn"] if layout == "splits" else [])])})
    assert {(m["acc1"], m["classes"], m["samples"]) for m in results.values()} == {(1.0, 3, samples - 1)}


def test_advice_on_labelled_images_leads_somewhere(tmp_path: Path) -> None:
    """A table without labels names its columns and the option; a folder of pairs is no folder of classes."""
    table = write_image_folder(tmp_path / "zoo", "table")
    with pytest.raises(
        UserError, match=r"no label column \('kind'\); its columns are filename, Category; .*--label COLUMN"
    ):
        open_images(table, label="kind")
    assert open_images(table, label="category") is not None
    (tmp_path / "zoo" / "number_100" / "train0.txt").write_text("a caption")
    assert open_images(tmp_path / "zoo") is None


def test_a_training_split_without_its_shards_is_none(numbers: Path) -> None:
    """A count of shards that were not downloaded (train/nshards.txt) does not keep the test split from being read."""
    (numbers / "train").mkdir()
    (numbers / "train" / "nshards.txt").write_text("3")
    dataset = open_dataset(numbers)
    assert dataset.train is None
    assert suite.run(ToyEncoder(), {"x": (dataset, "zero_shot")})["x/zero_shot"]["samples"] == 40


def test_labels_by_name(tmp_path: Path) -> None:
    """A label that is a name finds its place among given class names, the first of equal ones."""
    dataset = open_dataset(pack(tmp_path / "a.tar", [{"png": paint(1)}]), classnames=["b", "a", "a"])
    assert sample_label(dataset, sample(label="a")) == 1
    with pytest.raises(UserError, match=r"'z' of 00000 in .* is not among the 3 class names"):
        sample_label(dataset, sample(label="z"))


def test_labels_that_do_not_fit_name_the_file(numbers: Path) -> None:
    """A label beyond the class names names itself, the sample and the file."""
    (numbers / "classnames.txt").write_text("only one\n")
    dataset = open_dataset(numbers)
    with pytest.raises(
        UserError, match=r"label 1 of 00001 in .*0\.tar does not fit the 1 class names of .*classnames\.txt"
    ):
        class_indices(dataset, list(read(dataset, on_bad=pytest.fail)))
    with pytest.raises(UserError, match="label -1 marks"):
        sample_label(dataset, sample(cls=-1))


def test_missing_class_names_and_labels(numbers: Path) -> None:
    """Numeric labels without class names, and samples without the label, are refused with the remedy."""
    (numbers / "classnames.txt").unlink()
    dataset = open_dataset(numbers)
    with pytest.raises(UserError, match=r"no class names for the labels in .*; put classnames\.txt there"):
        sample_label(dataset, sample(cls=0))
    with pytest.raises(UserError, match=r"has no label 'cls' or 'label' \(its fields: style, txt\)"):
        sample_label(dataset, sample(txt="a", style="b"))
    with pytest.raises(UserError, match=r"has no label 'kind' \(its fields: none\)"):
        sample_label(open_dataset(numbers, label="kind"), sample())


@pytest.mark.parametrize("text", ["", " \n\n"])
def test_missing_captions(text: str) -> None:
    """Retrieval refuses a sample without a caption."""
    with pytest.raises(UserError, match=r"00000 in .* has no caption"):
        image_captions(sample(txt=text))


def test_empty_folder_and_missing_shard(numbers: Path, tmp_path: Path) -> None:
    """An empty folder, a counted shard that is not there, and broken files are one-line errors."""
    (tmp_path / "empty").mkdir()
    (numbers / "test" / "nshards.txt").write_text("3")
    with pytest.raises(UserError, match=r"no dataset in .*empty"):
        open_dataset(tmp_path / "empty")
    with pytest.raises(UserError, match=r"2\.tar"):
        open_dataset(numbers)
    (numbers / "test" / "nshards.txt").write_text("many")
    with pytest.raises(UserError, match=r"nshards\.txt must hold the number of shards, found 'many'"):
        open_dataset(numbers)
    (numbers / "dataset_type.txt").write_text("regression")
    (numbers / "test" / "nshards.txt").write_text("2")
    with pytest.raises(UserError, match=r"dataset_type\.txt says 'regression'"):
        open_dataset(numbers)


def test_find_datasets(numbers: Path, captioned: Path, tmp_path: Path) -> None:
    """Every dataset under a folder is found by its path, and the folder itself where it is one."""
    nested = tmp_path / "vtab" / "caltech"
    pack(nested / "test" / "0.tar", [{"png": paint(1), "cls": 0}])
    found = find_datasets(tmp_path)
    assert found == {"captioned": captioned, "numbers": numbers, "vtab-caltech": nested}
    assert find_datasets(numbers) == {"numbers": numbers}
    with pytest.raises(UserError, match="no dataset under"):
        find_datasets(numbers / "test")


def test_data_sets_of_one_name_are_refused(tmp_path: Path) -> None:
    """`a/b` and `a-b` would both be named `a-b`: neither is left out in silence."""
    for folder in ("a/b", "a-b"):
        pack(tmp_path / folder / "test-0.tar", [{"png": paint(1)}])
    with pytest.raises(UserError, match=r"a/b and .*a-b are both named 'a-b'; evaluate them separately"):
        find_datasets(tmp_path)


def test_a_split_is_no_data_set_of_its_own(tmp_path: Path) -> None:
    """Shards named test-*.tar inside pets/test are those of pets."""
    pack(tmp_path / "pets" / "test" / "test-000.tar", [{"png": paint(1)}])
    assert list(find_datasets(tmp_path)) == ["pets"]
