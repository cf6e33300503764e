"""`mmssl finetune` and `mmssl interpolate` from the command line."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmssl import MMSSL, load
from mmssl.apps.finetune import load_classifier, methods
from mmssl.apps.finetune.classifier import is_classifier
from mmssl.evaluate.classifiers import fine_tuning as tuning
from mmssl.rng import generator
from tests.apps.finetune.conftest import write_colors
from tests.cli.test_evaluate import refused, run
from tests.helpers.tiny_runs import COLORS


def test_a_classifier_is_written_and_its_figures_printed(
    model_folder: Path, colors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is printed, what --json holds and what stands in the folder are the same; a full folder is refused."""
    out, figures = tmp_path / "classifier", tmp_path / "figures.json"
    run("finetune", model_folder, colors, "--shots", "4", "--out", out, "--json", figures)
    printed = capsys.readouterr().out
    found = json.loads(figures.read_text())
    assert load_classifier(out).record["figures"] == found
    assert f"{found['acc1']:.4f}" in printed
    assert f"{found['zero_shot']:.4f}" in printed
    assert "gain: " in printed
    for name in COLORS:
        assert f"{name} " in printed
    assert "is not empty" in refused(capsys, "finetune", model_folder, colors, "--out", out)


def test_weights_that_are_not_better_are_told(
    model_folder: Path,
    colors: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After a rate that ruins the weights, the output says that those before the training are kept, and what to try."""
    monkeypatch.setattr(tuning, "STEPS", 4)
    run("finetune", model_folder, colors, "--method", "full", "--lr", "1e5", "--epochs", "1")
    assert "the weights before it are kept; try an --lr other than 100000" in capsys.readouterr().out


def test_the_accuracy_of_each_class_is_that_of_a_loop() -> None:
    """Counts and accuracies by class, and their mean; a class without samples is left out."""
    labels, hits = [0, 0, 0, 2, 2, 3], [1, 0, 1, 0, 1, 0]
    found = methods.by_class(np.array(hits, dtype=np.float64), torch.tensor(labels))
    for number in (0, 2, 3):
        own = [hit for hit, label in zip(hits, labels, strict=True) if label == number]
        assert found[number] == (len(own), pytest.approx(sum(own) / len(own)))
    assert found.keys() == {0, 2, 3}
    mean = methods.mean_over_classes(np.array(hits, dtype=np.float64), torch.tensor(labels))
    assert mean == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)


def test_a_calibrated_classifier_says_if_no_label_fits(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`calibrate` fits the classifier's own logits: probabilities are those of the stored factor, and `predict` shows
    the stored sigmoid of the familiarity. The zero-shot model stays without calibration, the folder can be copied, and
    images of a class that the classifier does not know are refused."""
    home, out = write_colors(tmp_path / "colors", test=120), tmp_path / "classifier"
    run("finetune", model_folder, home, "--out", out)
    run("calibrate", out, home, "--no-cache")
    stored = json.loads((out / "head_calibration.json").read_text())
    assert not (out / "calibration.json").exists()
    classifier = load_classifier(out)
    classifier.save(tmp_path / "copy")
    image = Image.new("RGB", (20, 20), "green")
    logits = classifier.logits(classifier.model.encode_image(image))[0].double()
    k, curve = stored["label_scale"], stored["label_curve"]
    logits = (torch.exp(curve * logits) - 1) / curve if curve else logits
    familiarity = (torch.logsumexp(k * logits, 0) - math.log(len(logits))) / k
    none = 1 - torch.sigmoid(stored["known_scale"] * familiarity + stored["known_bias"])
    for place in (out, tmp_path / "copy"):
        (found,) = load_classifier(place).predict(image)
        assert [found[label] for label in classifier.labels] == pytest.approx((k * logits).softmax(0).tolist())
        assert found.verdict is not None
        assert found.verdict.none == pytest.approx(float(none), abs=1e-6)
    image.save(tmp_path / "a.png")
    capsys.readouterr()
    run("predict", out, tmp_path / "a.png", "--json")
    assert json.loads(capsys.readouterr().out)[0]["none_of_these"] == pytest.approx(float(none), abs=0.02)
    assert MMSSL(out).calibrate(home)["samples"] == 60
    assert "leave out --by" in refused(capsys, "calibrate", out, home, "--by", "captions")
    (home / "classnames.txt").write_text("red\ngreen\nblue\npurple\n")
    assert "none of the classifier's labels" in refused(capsys, "calibrate", out, home, "--no-cache")


def test_several_numbers_of_labels_make_a_table(
    model_folder: Path, colors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One row a number and a way, with the image and the figures beside it."""
    out = tmp_path / "table"
    run("finetune", model_folder, colors, "--shots", "1,2", "--out", out)
    printed = capsys.readouterr().out
    assert "linear probe, untrained tower" in printed
    found = json.loads((out / "accuracy.json").read_text())
    for k in ("1", "2"):
        assert f"{100 * found['linear'][k]['acc1']:.1f}" in printed
        assert f"{100 * found['differences']['linear']['zero-shot'][k]['difference']:+.1f}" in printed
    assert (out / "accuracy.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("layout", ["folders", "splits", "table"])
def test_images_in_a_folder_per_class_or_a_table_need_no_shards(
    layout: str, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A classifier of these classes comes out, compared with the most frequent class; a broken image is named."""
    rng, home = generator("folders"), tmp_path / "zoo"
    for number in range(40):
        name = ["red", "blue"][number % 4 == 0]
        place = home / (["train", "val"][number % 5 == 0] if layout == "splits" else "") / f"{name}_thing"
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.clip(np.array(COLORS[name]) + rng.normal(0, 60, (20, 20, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(place / f"{number}.png")
    next(iter(sorted(home.rglob("*.png")))).write_bytes(b"broken")
    if layout == "table":
        rows = [f"{path.relative_to(home)};{path.parent.name.replace('_', ' ')}" for path in home.rglob("*.png")]
        (home / "pairs.csv").write_text("\n".join(["filename;breed", *rows]))
        home = home / "pairs.csv"
    run("finetune", model_folder, home, "--out", tmp_path / "classifier", "--bad-samples", "0.5")
    printed = capsys.readouterr().out
    assert load_classifier(tmp_path / "classifier").labels == ["blue thing", "red thing"]
    assert "always the most frequent class" in printed
    assert "2 classes" in printed


def test_bad_input_is_one_line(model_folder: Path, colors: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong method, a wrong number of labels, and a table without numbers are told before anything is read."""
    command = ("finetune", model_folder, colors)
    assert "choose from linear, full, lp-ft" in refused(capsys, *command, "--method", "lora")
    assert "--shots 'few'" in refused(capsys, *command, "--shots", "few")
    assert "a table needs --shots" in refused(capsys, *command, "--seeds", "3")


def test_interpolate_writes_a_model(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At alpha 0 it is the first one; a folder that holds something is left alone."""
    run("interpolate", model_folder, model_folder, "--alpha", "0", "--out", tmp_path / "between")
    assert load(tmp_path / "between").fingerprint() == load(model_folder).fingerprint()
    assert "not empty" in refused(capsys, "interpolate", model_folder, model_folder, "--out", tmp_path / "between")


def test_classifiers_predict_are_saved_and_mixed(
    model_folder: Path, colors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`mmssl predict` and the class take a classifier's folder and give its probabilities of its own labels; the class
    reads it once, and saves it whole; between two classifiers lies a classifier, between one and a model a model."""
    for seed in ("0", "1"):
        run("finetune", model_folder, colors, "--shots", "2", "--seed", seed, "--out", tmp_path / f"c{seed}")
    images = []
    for number, color in enumerate(("red", "navy")):
        images.append(tmp_path / f"{number}.png")
        Image.new("RGB", (30, 20), color).save(images[-1])
    expected = load_classifier(tmp_path / "c0").predict(images)
    capsys.readouterr()
    run("predict", tmp_path / "c0", *images, "--json")
    printed = json.loads(capsys.readouterr().out)
    assert [row["image"] for row in printed] == [str(path) for path in images]
    assert [row["probabilities"] for row in printed] == [pytest.approx(one) for one in expected]
    assert "with its own labels" in refused(capsys, "predict", tmp_path / "c0", images[0], "--labels", "a,b")
    model = MMSSL(tmp_path / "c0")
    model.save(tmp_path / "again")
    shutil.rmtree(tmp_path / "c0" / "tokenizer")
    for source in (model, MMSSL(tmp_path / "again")):
        found = source.predict(list(images))
        assert [prediction.probabilities for prediction in found] == [pytest.approx(one) for one in expected]
    (words,) = model.predict(images[0], ["a square", "a circle"])
    assert set(words.probabilities) == {"a square", "a circle"}
    run("interpolate", tmp_path / "again", tmp_path / "c1", "--alpha", "1", "--out", tmp_path / "mixed")
    assert load_classifier(tmp_path / "mixed").predict(images) == load_classifier(tmp_path / "c1").predict(images)
    capsys.readouterr()
    run("interpolate", model_folder, tmp_path / "c1", "--out", tmp_path / "model")
    assert "left out" in capsys.readouterr().out
    assert not is_classifier(tmp_path / "model")
