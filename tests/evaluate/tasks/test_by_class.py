"""Image retrieval by class, clustering and novelty through the suite, against computations on the same features."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from sklearn import metrics as oracle

from mmssl.errors import UserError
from mmssl.evaluate import suite
from mmssl.evaluate.tasks.novelty import draw_known, nearest
from tests.helpers.toy_encoder import ToyEncoder, pack, paint

OPTIONS = suite.SuiteOptions(draw=False)
CLASSES = 8


def dataset(folder: Path, train: bool = True) -> Path:
    """80 images of 8 classes of unequal sizes, and as many to train on."""
    labels = [n % CLASSES if n < 64 else n % 2 for n in range(80)]
    for split, offset in (("test", 0), ("train", 100)) if train else (("test", 0),):
        pack(folder / f"{split}-0.tar", [{"png": paint(50 + c, offset + n), "cls": c} for n, c in enumerate(labels)])
    (folder / "classnames.txt").write_text("\n".join(f"thing {50 + c}" for c in range(CLASSES)))
    return folder


def features(encoder: ToyEncoder, offset: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.tensor([n % CLASSES if n < 64 else n % 2 for n in range(80)])
    images = [paint(50 + c, offset + n) for n, c in enumerate(labels.tolist())]
    return torch.cat([encoder.encode_image([image]) for image in images]), labels


def evaluate(folder: Path, task: str, noise: float, out: Path | None = None) -> dict[str, Any]:
    (found,) = suite.run(ToyEncoder(noise=noise), {"d": (folder, task)}, out, OPTIONS).values()
    return found


def test_image_retrieval(tmp_path: Path) -> None:
    """Both metrics are pytorch-metric-learning's on the same features, are the means of outcomes.csv, lie in their
    intervals, and are perfect without noise."""
    folder = dataset(tmp_path / "d")
    assert evaluate(folder, "image_retrieval", 0)["map@r"] == 1.0
    found = evaluate(folder, "image_retrieval", 2.5, tmp_path / "out")
    rows, labels = features(ToyEncoder(noise=2.5))
    theirs = AccuracyCalculator(
        include=("precision_at_1", "mean_average_precision_at_r"),
        k="max_bin_count",
        device=torch.device("cpu"),
        knn_func=CustomKNN(CosineSimilarity()),
    ).get_accuracy(rows, labels)
    assert found["recall@1"] == pytest.approx(theirs["precision_at_1"], abs=1e-6)
    assert found["map@r"] == pytest.approx(theirs["mean_average_precision_at_r"], abs=1e-6)
    with (tmp_path / "out" / "d" / "image_retrieval" / "outcomes.csv").open() as file:
        table = list(csv.DictReader(file))
    for name in ("recall@1", "map@r"):
        assert found[name] == pytest.approx(np.mean([float(row[name]) for row in table]))
        assert found["intervals"][name][0] <= found[name] <= found["intervals"][name][1]
        assert found["baselines"][name]["chance"] < found[name] < 1
    assert (found["queries"], found["samples"], found["classes"]) == (80, 80, CLASSES)


def test_clustering(tmp_path: Path) -> None:
    """The metrics are scikit-learn's of the clusters in clusters.csv; clear classes are found whole; the V-measure of
    chance is above 0, and below that of noisy classes."""
    folder = dataset(tmp_path / "d", train=False)
    clear = evaluate(folder, "clustering", 0.1)
    assert (clear["v_measure"], clear["adjusted_rand"]) == (pytest.approx(1), pytest.approx(1))
    found = evaluate(folder, "clustering", 2.5, tmp_path / "out")
    with (tmp_path / "out" / "d" / "clustering" / "clusters.csv").open() as file:
        table = list(csv.DictReader(file))
    labels, clusters = [row["label"] for row in table], [row["cluster"] for row in table]
    assert found["v_measure"] == pytest.approx(oracle.v_measure_score(labels, clusters))
    assert found["adjusted_rand"] == pytest.approx(oracle.adjusted_rand_score(labels, clusters))
    assert len(set(clusters)) == CLASSES
    for name in ("v_measure", "adjusted_rand"):
        low, high = found["intervals"][name]
        assert low < found[name] < high
        assert (low + high) / 2 == pytest.approx(found[name])
    assert 0 < found["baselines"]["v_measure"]["chance"] < found["v_measure"] < 1


def test_novelty(tmp_path: Path) -> None:
    """AUROC (scikit-learn's) and the false positives where 95 % of the known images pass are the means over the draws
    of classes.csv, by prompts and by training images; both find clear classes."""
    folder = dataset(tmp_path / "d")
    clear = evaluate(folder, "novelty", 0.1)
    assert clear["auroc_prompts"] == clear["auroc_images"] == 1.0
    assert clear["fpr95_prompts"] == clear["fpr95_images"] == 0.0
    found, encoder = evaluate(folder, "novelty", 3.0, tmp_path / "out"), ToyEncoder(noise=3.0)
    rows, labels = features(encoder)
    train, train_labels = features(encoder, 100)
    with (tmp_path / "out" / "d" / "novelty" / "classes.csv").open() as file:
        table = list(csv.DictReader(file))
    aurocs, rates = [], []
    for draw in range(5):
        known = [row["known"] == "1" for row in table if row["draw"] == str(draw)]
        assert sum(known) == CLASSES / 2
        reference = train[[known[c] for c in train_labels.tolist()]]
        scores = np.sort((rows @ reference.T).numpy(), axis=1)[:, -5]
        truth = np.array([known[c] for c in labels.tolist()])
        aurocs.append(oracle.roc_auc_score(truth, scores))
        threshold = np.sort(scores[truth])[::-1][int(np.ceil(0.95 * truth.sum() - 1e-9)) - 1]
        rates.append(np.mean(scores[~truth] >= threshold))
    assert found["auroc_images"] == pytest.approx(np.mean(aurocs), abs=1e-6)
    assert found["fpr95_images"] == pytest.approx(np.mean(rates), abs=1e-6)
    assert 0.5 < found["auroc_images"] < 1
    assert found["intervals"]["auroc_prompts"][0] < found["auroc_prompts"] < found["intervals"]["auroc_prompts"][1]
    assert found["baselines"] == {
        "auroc_prompts": {"chance": 0.5},
        "fpr95_prompts": {"chance": 0.95},
        "auroc_images": {"chance": 0.5},
        "fpr95_images": {"chance": 0.95},
    }


def test_novelty_by_prompts(tmp_path: Path) -> None:
    """Without a training split it goes by the highest similarity to a prompt of the known classes."""
    folder = dataset(tmp_path / "d", train=False)
    (folder / "zeroshot_classification_templates.txt").write_text("{c}\n")
    found, encoder = evaluate(folder, "novelty", 3.0), ToyEncoder(noise=3.0)
    rows, labels = features(encoder)
    similarities = rows @ encoder.encode_text([f"thing {50 + c}" for c in range(CLASSES)]).T
    aurocs = [
        oracle.roc_auc_score(mask[labels].numpy(), similarities[:, mask].amax(1).numpy())
        for mask in draw_known(torch.arange(CLASSES), CLASSES)
    ]
    assert found["auroc_prompts"] == pytest.approx(np.mean(aurocs), abs=1e-6)
    assert "auroc_images" not in found


def test_nearest_is_the_kth_or_the_last() -> None:
    """The score is the k-th largest similarity, the smallest if there are fewer images, and 0 without any."""
    similarities = torch.tensor([[0.1, 0.9, 0.5]])
    assert [float(nearest(similarities, k)) for k in (1, 2, 3, 5)] == pytest.approx([0.9, 0.5, 0.1, 0.1])
    assert nearest(similarities[:, :0]).tolist() == [0.0]


@pytest.mark.parametrize("task", ["image_retrieval", "clustering", "novelty"])
def test_one_class_or_image_is_refused(tmp_path: Path, task: str) -> None:
    """Data on which there is nothing to measure are an error that says why."""
    labels = [0, 1] if task == "image_retrieval" else [0, 0]
    pack(tmp_path / "test-0.tar", [{"png": paint(n), "cls": c} for n, c in enumerate(labels)])
    (tmp_path / "classnames.txt").write_text("thing 1\nthing 2\n")
    with pytest.raises(UserError, match=f"task '{task}' of dataset 'd' needs"):
        evaluate(tmp_path, task, 0)
