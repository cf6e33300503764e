"""Corrupted images: the same every time, worse with severity, and judged as counted by hand."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mmssl.data.transforms import Pixels
from mmssl.errors import UserError
from mmssl.evaluate import suite
from mmssl.evaluate.datasets import open_dataset
from mmssl.evaluate.tasks import corruptions
from mmssl.evaluate.tasks.corruptions import CORRUPTIONS, SEVERITIES, bitmap, corrupt, corrupted, robustness
from mmssl.files import read_csv
from mmssl.rng import generator
from tests.helpers.toy_encoder import ToyEncoder, pack, paint


@pytest.fixture(scope="module")
def photograph() -> Pixels:
    """A gradient with a few shapes, 224 px."""
    y, x = np.mgrid[:224, :224]
    pixels = np.stack([x, y, 255 - x], axis=2).astype(np.uint8)
    pixels[60:120, 80:160] = (200, 40, 90)
    pixels[150:200, 20:60] = (20, 220, 60)
    return pixels


def test_the_names_are_the_librarys_fifteen() -> None:
    """Our list is the library's list of the paper's 15, in the same order."""
    imagecorruptions = pytest.importorskip("imagecorruptions")
    assert list(CORRUPTIONS) == imagecorruptions.get_corruption_names("common")


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_is_a_function_of_image_and_seed(name: str, photograph: Pixels) -> None:
    """The same seed gives the same pixels whatever was drawn before; NumPy's global generator stays where it was; a
    higher severity lies further from the clean image."""
    np.random.seed(5)
    before = np.random.get_state(legacy=False)["state"]["key"].tolist()
    first = corrupt(photograph, name, 3, seed=1)
    assert np.random.get_state(legacy=False)["state"]["key"].tolist() == before
    np.random.random(7)
    np.testing.assert_array_equal(corrupt(photograph, name, 3, seed=1), first)
    assert (first.shape, first.dtype) == (photograph.shape, np.uint8)
    distance = [
        float(np.square(corrupt(photograph, name, severity, seed=1).astype(float) - photograph).mean())
        for severity in (1, 5)
    ]
    assert 0 < distance[0] < distance[1]


def test_images_have_randomness_of_their_own(photograph: Pixels) -> None:
    """Two images get different noise, the same image the same."""
    noise = [corrupted(bitmap(image), "gaussian_noise", 1).astype(int) for image in (photograph, photograph // 2)]
    assert not np.array_equal(noise[0] - photograph, noise[1] - photograph // 2)
    np.testing.assert_array_equal(corrupted(bitmap(photograph), "gaussian_noise", 1), noise[0])


def test_figures_are_means_of_the_table() -> None:
    """Every figure is the mean of its part of the table of right and wrong, with its interval around it."""
    rng = generator(1)
    clean, under = rng.random(50) < 0.9, rng.random((15, 5, 50)) < 0.5
    found = robustness(clean, under)
    assert found.metrics["acc1_clean"] == clean.mean()
    assert found.metrics["acc1_corrupted"] == pytest.approx(under.mean())
    assert found.metrics["acc1_kept"] == pytest.approx(under.mean() / clean.mean())
    assert found.metrics["acc1_fog"] == pytest.approx(under[CORRUPTIONS.index("fog")].mean())
    assert found.metrics["acc1_severity5"] == pytest.approx(under[:, 4].mean())
    for name, (low, high) in found.intervals.items():
        assert low <= found.metrics[name] <= high
    assert (found.low <= found.accuracies).all()
    assert (found.accuracies <= found.high).all()
    assert "acc1_kept" not in robustness(np.zeros(4, bool), np.zeros((15, 5, 4), bool)).metrics


class BrightSide:
    """Knows whether the left or the right half of an image is the brighter one."""

    def __init__(self) -> None:
        self.images = 0

    def encode_image(self, images: list[bytes]) -> Tensor:
        self.images += len(images)
        pixels = [np.asarray(Image.open(io.BytesIO(image)).convert("L")).astype(float) for image in images]
        middle = [p.shape[1] // 2 for p in pixels]
        brighter = [float(p[:, :m].mean() - p[:, m:].mean()) for p, m in zip(pixels, middle, strict=True)]
        return torch.tensor([[b, -b] for b in brighter]) + 1e-6

    def encode_text(self, texts: list[str]) -> Tensor:
        return torch.tensor([[1.0, 0.0] if "left" in text else [0.0, 1.0] for text in texts])


def test_the_task_leaves_a_table_and_a_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Halves of different brightness survive noise and blur; each chosen image is encoded clean and 75 times."""
    monkeypatch.setattr(corruptions, "SAMPLES", 4)
    records = []
    for i in range(6):
        pixels = np.full((64, 64, 3), 40, np.uint8)
        pixels[:, :32] = 40 if i % 2 else 220
        pixels[:, 32:] = 220 if i % 2 else 40
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        records.append({"png": file.getvalue(), "cls": i % 2})
    data = open_dataset(pack(tmp_path / "h-0.tar", records), classnames=["left", "right"], templates=("{c}",))
    encoder = BrightSide()
    found = suite.run(encoder, {"h": (data, "corruptions")}, tmp_path / "out")["h/corruptions"]
    assert found["acc1_clean"] == found["acc1_gaussian_noise"] == found["acc1_defocus_blur"] == 1.0
    assert found["samples"] == 4
    assert encoder.images == 6 + 4 * 76
    folder = tmp_path / "out" / "h" / "corruptions"
    rows = list(csv.DictReader(io.StringIO((folder / "corruptions.csv").read_text())))
    assert [(r["corruption"], int(r["severity"])) for r in rows] == [(c, s) for c in CORRUPTIONS for s in SEVERITIES]
    assert np.mean([float(r["acc1"]) for r in rows]) == pytest.approx(found["acc1_corrupted"])
    drawn = np.asarray(Image.open(folder / "corruptions.png").convert("RGB"))
    assert min(drawn.shape[:2]) > 600
    assert 0.1 < (drawn != 255).any(axis=2).mean() < 0.95


def test_the_classes_are_those_of_all_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where labels name the classes, images that are not corrupted count for the classes to choose from."""
    for name, value in (("SAMPLES", 4), ("CORRUPTIONS", ("brightness",)), ("SEVERITIES", (1,))):
        monkeypatch.setattr(corruptions, name, value)
    labels = [f"number {100 + i}" for i in range(12)]
    shard = pack(tmp_path / "n-0.tar", [{"png": paint(100 + i), "json": {"label": labels[i]}} for i in range(12)])
    seen: list[str] = []

    class Reading(ToyEncoder):
        def encode_text(self, texts: Sequence[str]) -> Tensor:
            seen.extend(texts)
            return super().encode_text(texts)

    data = open_dataset(shard, templates=("{c}",))
    found = suite.run(Reading(), {"n": (data, "corruptions")}, tmp_path / "out", suite.SuiteOptions(draw=False))[
        "n/corruptions"
    ]
    assert seen == labels
    outcomes = read_csv(tmp_path / "out" / "n" / "corruptions" / "outcomes.csv")
    assert len(outcomes) == found["samples"] == 4
    assert np.mean([float(row["acc1_clean"]) for row in outcomes]) == found["acc1_clean"]


def test_a_missing_library_is_named_before_anything_is_read(numbers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the library the error says how to install it."""
    monkeypatch.setattr(corruptions, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"mmssl\[corruptions\]"):
        suite.run(BrightSide(), {"n": (numbers, "corruptions")})
