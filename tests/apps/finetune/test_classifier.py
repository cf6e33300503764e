"""The classifier's folder."""

import json
from pathlib import Path

import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mmssl import MMSSL, Model
from mmssl.apps.export import export, shrink
from mmssl.apps.export.reader import png_files
from mmssl.apps.finetune import Classifier, load_classifier
from mmssl.errors import UserError
from mmssl.rng import torch_generator


@pytest.fixture
def classifier(model: Model) -> Classifier:
    """Three labels in no alphabetic order, with a random head."""
    weight = torch.randn(3, model.config.embed_dim, generator=torch_generator("head"))
    return Classifier(model, ["dog", "cat", "bird"], weight, torch.tensor([0.1, 0.0, -0.1]), {"method": "linear"})


def test_predictions_are_the_softmax_of_the_head(classifier: Classifier, model: Model) -> None:
    """Highest first, summing to one, for one image or several in any form, before and after saving."""
    images = [Image.new("RGB", (30, 20), color) for color in ("red", "navy")]
    logits = model.encode_image(images) @ classifier.weight.T + classifier.bias
    for found, expected in zip(classifier.predict(images), logits.double().softmax(1), strict=True):
        assert list(found.values()) == sorted(found.values(), reverse=True)
        assert sum(found.values()) == pytest.approx(1)
        assert [found[label] for label in ("dog", "cat", "bird")] == pytest.approx(expected.tolist())
    (alone,) = classifier.predict(images[0])
    assert alone == pytest.approx(classifier.predict(images)[0], abs=1e-6)
    assert classifier.predict([]) == []


def test_the_folder_is_whole_and_holds_no_pickle(classifier: Classifier, tmp_path: Path) -> None:
    """Everything comes back from the folder alone, wherever it is moved."""
    classifier.save(tmp_path / "a")
    moved = (tmp_path / "a").rename(tmp_path / "b")
    again = load_classifier(moved)
    image = Image.new("RGB", (30, 20), "green")
    assert again.predict(image) == classifier.predict(image)
    record = json.loads((moved / "classifier.json").read_text())
    assert record["labels"] == ["dog", "cat", "bird"]
    assert record["method"] == "linear"
    assert record["version"]
    assert {path.suffix for path in moved.rglob("*") if path.is_file()} <= {".json", ".safetensors", ".txt"}


def test_a_folder_that_is_none_or_damaged_is_refused(
    classifier: Classifier, model_folder: Path, tmp_path: Path
) -> None:
    """A model alone, another format, a head of another size and a cut head each give one line that says so."""
    with pytest.raises(UserError, match=r"it has no classifier\.json"):
        load_classifier(model_folder)
    classifier.save(tmp_path)
    record = json.loads((tmp_path / "classifier.json").read_text())
    (tmp_path / "classifier.json").write_text(json.dumps({**record, "format": 99}))
    with pytest.raises(UserError, match="format 99"):
        load_classifier(tmp_path)
    (tmp_path / "classifier.json").write_text(json.dumps({**record, "labels": ["dog", "cat"]}))
    with pytest.raises(UserError, match="does not fit the 2 labels"):
        load_classifier(tmp_path)
    (tmp_path / "classifier.json").write_text(json.dumps(record))
    head = load_file(tmp_path / "head.safetensors")
    save_file({"weight": head["weight"]}, tmp_path / "head.safetensors")
    with pytest.raises(UserError, match="not a usable classifier"):
        load_classifier(tmp_path)
    (tmp_path / "head.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="no readable weights"):
        load_classifier(tmp_path)


@pytest.mark.slow
def test_onnx_gives_the_same_probabilities(classifier: Classifier, tmp_path: Path) -> None:
    """onnxruntime alone, on three images, agrees with predict to 1e-5; the labels lie beside it; so too where the
    class exports a classifier's folder; and with weights of 16 bits to 0.005."""
    done = export(classifier.model, "onnx", tmp_path / "out", classifier=classifier)
    assert done.difference < 1e-5
    classifier.save(tmp_path / "saved")
    exported = MMSSL(tmp_path / "saved").export("onnx", tmp_path / "exported")
    images = [Image.new("RGB", (30, 20), color) for color in ("red", "navy", "white")]
    pixels = torch.stack([classifier.model.render(image) for image in images])
    session = onnxruntime.InferenceSession(str(exported / "classifier.onnx"), providers=["CPUExecutionProvider"])
    (rows,) = session.run(None, {"images": pixels.numpy()})
    labels = json.loads((tmp_path / "out" / "labels.json").read_text())
    assert labels == json.loads((exported / "labels.json").read_text())
    for row, expected in zip(rows, classifier.predict(images), strict=True):
        assert dict(zip(labels, row.tolist(), strict=True)) == pytest.approx(expected, abs=1e-5)
    shrink(tmp_path / "out", 16)
    assert done.classify is not None
    file = png_files(pixels)[0]
    torch.testing.assert_close(done.classify([file]), classifier.probabilities(file), atol=5e-3, rtol=0)
