"""Every task through the suite, on one process and on several."""

import csv
import io
from pathlib import Path

import pytest
import torch
from sklearn.metrics import average_precision_score

from mmssl.errors import UserError
from mmssl.evaluate import suite
from mmssl.evaluate.compare import compare_results
from mmssl.evaluate.datasets import open_dataset, read
from mmssl.evaluate.encode import encode_images
from mmssl.evaluate.tasks.multilabel import evaluate_scores, label_matrix
from tests.helpers.evaluation_ranks import on_ranks
from tests.helpers.toy_encoder import ToyEncoder, pack, paint


@pytest.fixture
def trained(numbers: Path) -> Path:
    """The folder of numbers with a training split of 4 to 5 images a class, each with a style."""
    records = [
        {
            "png": paint(100 + i % 6, 100 + i),
            "cls": i % 6,
            "txt": f"number {100 + i % 6}",
            "json": {"style": i % 2},
        }
        for i in range(28)
    ]
    pack(numbers / "train" / "0.tar", records)
    (numbers / "train" / "nshards.txt").write_text("1")
    return numbers


@pytest.mark.parametrize("task", ["linear_probe", "knn"])
def test_classifiers_of_frozen_features(trained: Path, tmp_path: Path, task: str) -> None:
    """On separable features they are perfect; their tables and plots are those of any classification."""
    found = suite.run(ToyEncoder(noise=0.1), {"n": (trained, task)}, tmp_path / "out")[f"n/{task}"]
    assert found["acc1"] == found["mean_per_class_recall"] == 1.0
    assert (found["classes"], found["samples"], found["train_samples"]) == (7, 40, 28)
    names = {path.name for path in (tmp_path / "out" / "n" / task).iterdir()}
    tables = {"per_class.csv", "confusions.csv", "predictions.csv"}
    assert names == tables | {"examples.png", "examples.json", "thumbnails"}


def test_few_shot(trained: Path) -> None:
    """Every number of shots that each class has is measured; more shots are better on noisy features."""
    found = suite.run(ToyEncoder(noise=3.0), {"n": (trained, "few_shot")})["n/few_shot"]
    assert [name for name in found if name.startswith("acc1@")] == ["acc1@1", "acc1@2", "acc1@4"]
    assert found["acc1@1"] < found["acc1@4"] <= 1.0
    assert found["std@1"] > 0
    low, high = found["intervals"]["acc1@4"]
    assert low <= found["acc1@4"] <= high


def test_few_shot_is_compared_sample_by_sample(trained: Path, tmp_path: Path) -> None:
    """What is kept of each sample has the reported figures for its means, and the less noisy model wins them."""
    results = {
        name: suite.run(ToyEncoder(noise=noise), {"n": (trained, "few_shot")}, tmp_path / name)["n/few_shot"]
        for name, noise in (("bad", 4.0), ("good", 2.0))
    }
    found = compare_results(tmp_path / "bad", tmp_path / "good")
    assert list(found) == ["n/few_shot/acc1@1", "n/few_shot/acc1@2", "n/few_shot/acc1@4"]
    for name, d in found.items():
        figure = name.rpartition("/")[2]
        assert (d.first, d.second) == pytest.approx((results["bad"][figure], results["good"][figure]))
        assert d.interval[0] > 0


def test_a_training_split_is_needed(numbers: Path) -> None:
    """Without one the error says where it should be."""
    with pytest.raises(UserError, match=r"'n' has no training split; give a folder with train/\*\.tar"):
        suite.run(ToyEncoder(), {"n": (numbers, "knn")})


def test_training_images_are_encoded_once(trained: Path) -> None:
    """Three tasks that train on the same split encode it once."""
    encoder = ToyEncoder()
    data = {task: (trained, task) for task in ("linear_probe", "knn", "few_shot")}
    suite.run(encoder, data, options=suite.SuiteOptions(batch_size=64))
    assert encoder.calls == [40, 28]


def test_geometry_of_pairs(captioned: Path) -> None:
    """A perfect encoder has its pairs closer than a noisy one; the figures are finite."""
    data = {"c": (captioned, "geometry")}
    near, far = (suite.run(ToyEncoder(noise=noise), data)["c/geometry"] for noise in (0.0, 4.0))
    assert near["alignment"] < far["alignment"]
    assert near["samples"] == 30
    assert set(near) == set(far)


def test_slices_of_a_classification(trained: Path, tmp_path: Path) -> None:
    """Accuracies by a metadata field go to slices.csv and the widest gap to the figures."""
    shards = str(trained / "train" / "*.tar")
    data = open_dataset(shards, classnames=trained / "classnames.txt", slice_by=["style"])
    found = suite.run(ToyEncoder(noise=4.0), {"n": (data, "zero_shot")}, tmp_path, suite.SuiteOptions(draw=False))[
        "n/zero_shot"
    ]
    text = (tmp_path / "n" / "zero_shot" / "slices.csv").read_text()
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [(row["field"], row["samples"]) for row in rows] == [("style", "14")] * 2
    assert sum(float(row["accuracy"]) for row in rows) / 2 == pytest.approx(found["acc1"])
    gap = found["gaps"]["style"]
    assert gap["width"] == pytest.approx(float(rows[1]["accuracy"]) - float(rows[0]["accuracy"]))
    assert {gap["worst"], gap["best"]} == {"0", "1"}


def test_multilabel(tmp_path: Path) -> None:
    """Mean average precision over the classes with positives is scikit-learn's; others have none."""
    labels = [[f"number {100 + i % 5}", f"number {100 + i % 3}"] for i in range(20)]
    records = [{"png": paint(100 + i % 5, i), "json": {"labels": of}} for i, of in enumerate(labels)]
    shard = pack(tmp_path / "m-0.tar", records)
    encoder = ToyEncoder(noise=2.0)
    names = [f"number {100 + i}" for i in range(6)]
    dataset = open_dataset(shard, classnames=names, templates=("{c}",))
    found = suite.run(encoder, {"m": (dataset, "multilabel")}, tmp_path / "out")["m/multilabel"]
    embedded = encode_images(encoder, list(read(dataset, on_bad=pytest.fail)))
    scores = embedded.features @ encoder.encode_text(names).T
    targets = torch.tensor([[int(name in of) for name in names] for of in labels])
    assert torch.equal(label_matrix(dataset, embedded.samples)[1], targets)
    expected = [average_precision_score(targets[:, c], scores[:, c]) for c in range(5)]
    assert found["mean_average_precision"] == pytest.approx(sum(expected) / 5, abs=1e-6)
    low, high = found["intervals"]["mean_average_precision"]
    assert low < found["mean_average_precision"] < high
    assert (found["classes"], found["samples"]) == (6, 20)
    text = (tmp_path / "out" / "m" / "multilabel" / "per_class.csv").read_text()
    assert list(csv.DictReader(io.StringIO(text)))[5]["average_precision"] == ""


def test_multilabel_is_clip_benchmarks() -> None:
    """The mean average precision agrees with clip_benchmark's to 1e-6 where every class has positives."""
    theirs = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification").average_precision_per_class
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(60, 8, generator=generator)
    targets = (torch.rand(60, 8, generator=generator) < 0.2).long()
    targets[0] = 1
    expected = float(theirs(scores, targets).mean())
    assert evaluate_scores(scores, targets).metrics["mean_average_precision"] == pytest.approx(expected, abs=1e-6)


def test_multilabel_needs_lists(numbers: Path, tmp_path: Path) -> None:
    """A sample without a list of labels, and a label that does not fit, are named."""
    with pytest.raises(UserError, match="has no list of labels in 'labels' or 'label' or 'cls'"):
        suite.run(ToyEncoder(), {"n": (numbers, "multilabel")})
    shard = pack(tmp_path / "m-0.tar", [{"png": paint(1), "json": {"labels": [9]}}])
    with pytest.raises(UserError, match="label 9 of 00000"):
        suite.run(ToyEncoder(), {"n": (open_dataset(shard, classnames=["a"]), "multilabel")})


@pytest.mark.parametrize("names", [["number 1"], None])
def test_lists_without_any_label_are_refused(tmp_path: Path, names: list[str] | None) -> None:
    """Where every list is empty there is nothing to measure, which is told before figures are written."""
    shard = pack(tmp_path / "m-0.tar", [{"png": paint(100 + i), "json": {"labels": []}} for i in range(3)])
    with pytest.raises(UserError, match=r"no sample of .*m-0\.tar has a label: all lists are empty"):
        suite.run(ToyEncoder(), {"n": (open_dataset(shard, classnames=names), "multilabel")}, tmp_path / "out")


def test_one_sample_is_enough_where_it_can_be(tmp_path: Path) -> None:
    """Zero-shot, probes and retrieval of a single sample of a single class are perfect; geometry says that it needs
    two."""
    record = {"png": paint(100), "txt": "number 100", "json": {"label": "number 100"}}
    for split in ("train", "test"):
        pack(tmp_path / "one" / f"{split}-0.tar", [record])
    tasks = ["zero_shot", "linear_probe", "few_shot", "knn", "retrieval"]
    found = suite.run(
        ToyEncoder(), {"one": (tmp_path / "one", tasks)}, tmp_path / "out", suite.SuiteOptions(draw=False)
    )
    assert [found[f"one/{task}"]["acc1"] for task in ("zero_shot", "linear_probe", "knn")] == [1.0] * 3
    assert found["one/few_shot"]["acc1@1"] == found["one/retrieval"]["text_retrieval_recall@1"] == 1.0
    with pytest.raises(UserError, match="'geometry' of dataset 'one' needs two samples"):
        suite.run(ToyEncoder(), {"one": (tmp_path / "one", "geometry")})


def noisy() -> ToyEncoder:
    return ToyEncoder(noise=3.0)


@pytest.mark.parametrize("world_size", [2, 7])
def test_several_processes_equal_one(trained: Path, captioned: Path, tmp_path: Path, world_size: int) -> None:
    """Figures are exactly the same on every rank; the ranks share the images, and one writes."""
    data = {task: (trained, task) for task in ("zero_shot", "knn")}
    data |= {task: (captioned, task) for task in ("retrieval", "geometry")}
    alone = suite.run(ToyEncoder(noise=3.0), data, options=suite.SuiteOptions(batch_size=8))
    outcomes = on_ranks(world_size, noisy, data, tmp_path / "out", batch_size=8, draw=False)
    assert [results for results, _ in outcomes] == [alone] * world_size
    assert sum(sum(encoder.calls) for _, encoder in outcomes) == 40 + 28 + 30
    assert (tmp_path / "out" / "results.json").is_file()


def test_broken_images_over_processes(numbers: Path) -> None:
    """An image that one rank cannot decode is left out on all, and so is a whole batch of them, which leaves a rank
    without any; if none can be decoded, all ranks stop alike."""
    records = [{"png": paint(100 + i % 6, i) if i != 9 else b"broken", "cls": i % 6} for i in range(40)]
    pack(numbers / "test" / "0.tar", records[:25])
    alone = suite.run(ToyEncoder(noise=3.0), {"n": (numbers, "zero_shot")}, options=suite.SuiteOptions(batch_size=8))
    outcomes = on_ranks(2, noisy, {"n": (numbers, "zero_shot")}, batch_size=8)
    assert [results for results, _ in outcomes] == [alone] * 2
    assert alone["n/zero_shot"]["bad_samples"] == 1
    records[8:16] = [{"png": b"broken", "cls": 0}] * 8
    for split in ("0", "1"):
        pack(numbers / "test" / f"{split}.tar", records[:16] if split == "0" else [])
    alone = suite.run(ToyEncoder(noise=3.0), {"n": (numbers, "zero_shot")}, options=suite.SuiteOptions(batch_size=8))
    outcomes = on_ranks(2, noisy, {"n": (numbers, "zero_shot")}, batch_size=8)
    assert [results for results, _ in outcomes] == [alone] * 2
    assert (alone["n/zero_shot"]["samples"], alone["n/zero_shot"]["bad_samples"]) == (8, 9)  # with the empty tar
    pack(numbers / "test" / "0.tar", [{"png": b"broken", "cls": 0}] * 16)
    errors = on_ranks(2, noisy, {"n": (numbers, "zero_shot")}, batch_size=8)
    assert all(isinstance(error, UserError) for error in errors)
    assert str(errors[0]) == str(errors[1])
    assert str(errors[0]).startswith(f"no image from {numbers / 'test' / '0.tar'}:00000 on")
