"""Zero-shot segmentation, against scikit-learn, torchmetrics and an encoder whose answers are known."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import jaccard_score
from torch import Tensor
from torchmetrics.classification import MulticlassJaccardIndex

import mmssl
from mmssl.data.transforms import EvalView
from mmssl.errors import UserError
from mmssl.evaluate import suite
from mmssl.evaluate.datasets import open_dataset
from mmssl.evaluate.metrics import segmentation
from mmssl.evaluate.tasks.segmentation import IGNORED, read_mask, visible
from tests.helpers.evaluation_ranks import on_ranks
from tests.helpers.toy_encoder import ToyEncoder, pack
from tests.models.test_patches import clip_folder

OPTIONS = suite.SuiteOptions(draw=False)
COLOURS = torch.eye(3)


class ColourEncoder:
    """Red, green and blue are classes 0, 1 and 2; a patch is its mean colour."""

    def __init__(self, side: int = 32, patch: int = 4) -> None:
        self.view = EvalView(side)
        self.patch = patch

    def render(self, image: bytes) -> Tensor:
        return self.view(image)

    def encode_image(self, images: list[bytes]) -> Tensor:
        return self.encode_rendered(torch.stack([self.render(image) for image in images]))

    def encode_rendered(self, images: Tensor, patches: bool = False) -> Tensor:
        means = F.avg_pool2d(images.float(), self.patch).permute(0, 2, 3, 1)
        return F.normalize(means if patches else means.mean(dim=(1, 2)), dim=-1)

    def encode_text(self, texts: list[str]) -> Tensor:
        return COLOURS[[("red", "green", "blue").index(text.strip(".").split()[-1]) for text in texts]]


def png(pixels: np.ndarray, mode: str | None = None) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(file, "PNG")
    return file.getvalue()


def scene(seed: int, height: int = 40, width: int = 56) -> tuple[np.ndarray, np.ndarray]:
    """Blocks of 8 pixels in one of three colours, and their classes."""
    classes = np.random.default_rng(seed).integers(0, 3, (height // 8, width // 8)).repeat(8, 0).repeat(8, 1)
    return (np.eye(3)[classes] * 255).astype(np.uint8), classes.astype(np.uint8)


def scenes(folder: Path, masks: list[np.ndarray | None], *, name: str = "mask.png", side: int = 40) -> Path:
    """A dataset of scenes with the given masks in place of the right ones; None: without one."""
    records: list[dict[str, Any]] = []
    for seed, mask in enumerate(masks):
        record: dict[str, Any] = {"png": png(scene(seed, side, side + 16)[0])}
        records.append(record if mask is None else {**record, name: png(mask)})
    pack(folder / "test" / "0.tar", records)
    (folder / "classnames.txt").write_text("red\ngreen\nblue\n")
    (folder / "zeroshot_classification_templates.txt").write_text("{c}\n")
    return folder


def evaluate(folder: Path, out: Path | None = None, encoder: Any = None) -> dict[str, Any]:
    encoder = encoder or ColourEncoder()
    (found,) = suite.run(encoder, {"s": (folder, "segmentation")}, out, OPTIONS).values()
    return found


def test_counts_are_those_of_two_libraries() -> None:
    """Mean and per-class overlap equal scikit-learn's and torchmetrics' on random labels, one class of which occurs in
    neither and one in the predictions alone."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (3, 500), generator=generator)
    predictions = torch.where(torch.rand(3, 500, generator=generator) < 0.5, labels, labels + 1)
    counts = sum(segmentation.pixel_counts(p, y, 6) for p, y in zip(predictions, labels, strict=True))
    assert isinstance(counts, Tensor)
    overlap = segmentation.intersection_over_union(counts)
    theirs = jaccard_score(labels.flatten(), predictions.flatten(), average=None, labels=range(5))
    np.testing.assert_allclose(overlap[:5].numpy(), theirs, atol=1e-12)
    assert overlap[5].isnan()
    found = segmentation.summarize(counts)
    assert found["mean_iou"] == pytest.approx(float(MulticlassJaccardIndex(6)(predictions, labels)), abs=1e-6)
    assert found["pixel_accuracy"] == pytest.approx(float((predictions == labels).float().mean()))
    recalls = [float((predictions == c)[labels == c].float().mean()) for c in range(4)]
    assert found["mean_class_accuracy"] == pytest.approx(np.mean(recalls))


def test_baselines_are_those_of_constant_and_random_answers() -> None:
    """Majority equals the metrics of one class everywhere, chance the mean over many shuffled labels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0] * 5000 + [1] * 3000 + [2] * 2000)
    found = segmentation.baselines(segmentation.pixel_counts(labels, labels, 4)[2])
    constant = segmentation.summarize(segmentation.pixel_counts(torch.zeros_like(labels), labels, 4))
    assert {name: entry["majority"] for name, entry in found.items()} == pytest.approx(constant)
    shuffled = [labels[torch.randperm(len(labels), generator=generator)] for _ in range(30)]
    drawn = [segmentation.summarize(segmentation.pixel_counts(s, labels, 4)) for s in shuffled]
    for name, entry in found.items():
        assert entry["chance"] == pytest.approx(np.mean([d[name] for d in drawn]), abs=3e-3)


def test_classes_of_pixels_lie_between_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of classes give the same as all at once; the scores are torch's bilinear ones."""
    generator = torch.Generator().manual_seed(0)
    patches = F.normalize(torch.randn(3, 4, 8, generator=generator), dim=-1)
    weights = F.normalize(torch.randn(7, 8, generator=generator), dim=-1)
    scores = F.interpolate(torch.einsum("hwd,cd->chw", patches, weights)[None], (30, 41), mode="bilinear")[0]
    assert torch.equal(segmentation.segment(patches, weights, 30, 41), scores.argmax(dim=0))
    monkeypatch.setattr(segmentation, "SCORES_AT_ONCE", 30 * 41 * 2)
    assert torch.equal(segmentation.segment(patches, weights, 30, 41), scores.argmax(dim=0))


@pytest.mark.parametrize("name", ["mask.png", "seg.png"])
def test_the_colours_of_scenes_are_found(name: str, tmp_path: Path) -> None:
    """An encoder that sees colours is right everywhere but near borders; with the masks of other scenes it is at
    chance. Samples without a mask are counted, pixels outside the square that the model sees are not."""
    right = evaluate(scenes(tmp_path / "a", [scene(s)[1] for s in range(6)], name=name), tmp_path / "out")
    assert right["pixel_accuracy"] > 0.85
    assert right["mean_iou"] > 0.75
    assert (right["samples"], right["classes"]) == (6, 3)
    low, high = right["intervals"]["mean_iou"]
    assert low <= right["mean_iou"] <= high
    table = (tmp_path / "out" / "s" / "segmentation" / "per_class.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in table] == ["class", "red", "green", "blue"]
    assert sum(int(line.split(",")[4]) for line in table[1:]) == 6 * 40 * 40
    wrong = evaluate(scenes(tmp_path / "b", [scene(s + 50)[1] for s in range(6)], name=name))
    assert wrong["mean_iou"] == pytest.approx(wrong["baselines"]["mean_iou"]["chance"], abs=0.08)
    some = evaluate(scenes(tmp_path / "c", [scene(0)[1], None, scene(2)[1]], name=name))
    assert (some["samples"], some["samples_without_mask"]) == (2, 1)


def test_pixels_that_do_not_count_change_nothing(tmp_path: Path) -> None:
    """With 255 where the answer was wrong, everything is right."""
    masks = [scene(s)[1] for s in range(3)]
    plain = evaluate(scenes(tmp_path / "a", masks))
    encoder = ColourEncoder()
    for seed, mask in enumerate(masks):
        patches = encoder.encode_rendered(encoder.render(png(scene(seed)[0]))[None], patches=True)[0]
        square = visible(torch.from_numpy(mask), "shortest")
        square[segmentation.segment(patches, COLOURS, *square.shape) != square] = IGNORED
    found = evaluate(scenes(tmp_path / "b", masks))
    assert plain["mean_iou"] < found["mean_iou"] == found["pixel_accuracy"] == 1.0


def test_a_real_model_equals_loops_over_its_images(tmp_path: Path) -> None:
    """Mean overlap through the suite, on one process and on three, equals scikit-learn's over all pixels, predicted
    image by image from the public API."""
    clip_folder(tmp_path / "model")
    model = mmssl.load(tmp_path / "model")
    folder = scenes(tmp_path / "data", [scene(s)[1] for s in range(5)])
    dataset = open_dataset(folder, name="s")
    found = suite.run(model, {"s": (dataset, "segmentation")}, None, OPTIONS)["s/segmentation"]
    weights = model.encode_text(["red", "green", "blue"])
    predicted, labelled = [], []
    for seed in range(5):
        pixels, mask = scene(seed)
        similarities = model.encode_image(pixels, patches=True)[0] @ weights.T
        maps = F.interpolate(similarities.permute(2, 0, 1)[None], (40, 40), mode="bilinear")[0]
        predicted.append(maps.argmax(dim=0).flatten())
        labelled.append(mask[:, 8:48].flatten())
    labels, predictions = np.concatenate(labelled), np.concatenate(predicted)
    assert found["mean_iou"] == pytest.approx(jaccard_score(labels, predictions, average="macro"), abs=1e-6)
    shared = on_ranks(3, ColourEncoder, {"s": (str(folder), "segmentation")})
    alone = evaluate(folder)
    assert [run["s/segmentation"]["mean_iou"] for run, _ in shared] == [alone["mean_iou"]] * 3


def test_masks_of_every_kind(tmp_path: Path) -> None:
    """Gray, palette and 16-bit PNGs hold the same numbers; the first dimensions of a model can be measured."""
    classes = scene(0)[1]
    palette = Image.fromarray(classes, "P")
    palette.putpalette([7, 7, 7, 200, 0, 0, 0, 200, 0])
    file = io.BytesIO()
    palette.save(file, "PNG")
    for content in (png(classes), file.getvalue(), png(classes.astype(np.uint16))):
        assert torch.equal(read_mask(content), torch.from_numpy(classes).long())
    clip_folder(tmp_path / "model")
    options = suite.SuiteOptions(draw=False, dims=(8, 24))
    folder = scenes(tmp_path / "data", [classes])
    found = suite.run(mmssl.load(tmp_path / "model"), {"s": (folder, "segmentation")}, None, options)
    assert set(found) == {"s/segmentation@8", "s/segmentation@24"}


def test_what_cannot_be_segmented_is_named(tmp_path: Path) -> None:
    """No class names, no mask, masks in colour, of another size, or with a class too many; a model without patches."""
    right = scene(0)[1]
    nameless = scenes(tmp_path / "n", [right])
    (nameless / "classnames.txt").unlink()
    cases: list[tuple[Path, str]] = [
        (nameless, "needs the names of the classes"),
        (scenes(tmp_path / "m", [None]), "no sample of dataset 's' has a mask"),
        (scenes(tmp_path / "c", [scene(0)[0]]), "no sample of dataset 's' has a mask"),
        (scenes(tmp_path / "s", [right[:, :40]]), "has 40 x 40 pixels, its image 56 x 40"),
        (scenes(tmp_path / "k", [right + 1]), "has class 3, but .*classnames.txt names 3"),
    ]
    for folder, words in cases:
        with pytest.raises(UserError, match=words):
            evaluate(folder)
    folder = scenes(tmp_path / "t", [right])
    (folder / "classnames.txt").write_text("1\n2\n3\n")
    (folder / "zeroshot_classification_templates.txt").write_text("number {c}\n")
    with pytest.raises(UserError, match="shows no patches"):
        evaluate(folder, encoder=ToyEncoder())
