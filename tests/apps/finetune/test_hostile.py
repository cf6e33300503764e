"""Data and settings that could break fine-tuning, or make it silently bad: a good classifier, or one clear line."""

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmssl.apps.finetune import load_classifier
from mmssl.rng import generator
from tests.cli.test_evaluate import refused, run
from tests.helpers.images import encode
from tests.helpers.tiny_runs import COLORS
from tests.helpers.toy_encoder import pack

HUES = list(COLORS.values())
NAMES = list(COLORS)


def square(hue: int, number: int = 0, side: int = 20, noise: float = 40) -> Image.Image:
    """Noisy and of one of four colours."""
    pixels = np.array(HUES[hue % 4]) + generator("hostile", hue, number).normal(0, noise, (side, side, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def of_modes(number: int) -> Image.Image:
    """Each class in eight modes of pixels."""
    image, mode = (
        square(number, number, noise=20),
        ("L", "CMYK", "RGBA", "P", "LA", "I;16", "1", "RGB")[number // 4 % 8],
    )
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    return image.convert(mode)


def of_sizes(number: int) -> Image.Image:
    """Single pixels and thin lines among squares."""
    return square(number, number, noise=20).resize(((20, 20), (1, 1), (1, 900), (900, 1))[number // 4 % 4])


def table(folder: Path, labels: Sequence[str], image: Callable[[int], Image.Image] | None = None) -> Path:
    """A table of images whose colour goes with their label, unless they are given."""
    folder.mkdir()
    known = list(dict.fromkeys(labels))
    for number, label in enumerate(labels):
        shown = image(number) if image is not None else square(known.index(label), number)
        (folder / f"{number}.tiff").write_bytes(encode(shown, "TIFF"))
    with (folder / "t.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("filename", "label"), *((f"{n}.tiff", label) for n, label in enumerate(labels))])
    return folder / "t.csv"


def shard(folder: Path, labels: Sequence[object]) -> Path:
    """A shard with labels in the .json."""
    pack(folder / "0.tar", [{"png": encode(square(n, n), "PNG"), "json": {"kind": v}} for n, v in enumerate(labels)])
    return folder / "0.tar"


@dataclass(frozen=True)
class Kind:
    """Data, options, and what is said."""

    name: str
    data: Callable[[Path], Path]
    options: tuple[str, ...] = ()
    error: str | None = None
    """Words of the one line that refuses it; None: a classifier is made."""
    says: str = ""
    """Words that are printed."""
    least: float = 0.0
    """Accuracy over the classes that it must reach."""


FOUR = NAMES * 12
ODD = ["../../etc/passwd", "..", "/abs", "a\nb", "日本\u202e語", "[red]", "{c}", "Fußgänger 🚶"]
KINDS = [
    Kind("one class", lambda p: table(p / "x", ["red"] * 20), error="one class only"),
    Kind("classes of one image", lambda p: table(p / "x", [*FOUR, "sea", "leaf"]), says="2 of 6 classes have no test"),
    Kind(
        "too few for the shots",
        lambda p: table(p / "x", [*FOUR, "sea"]),
        ("--shots", "2"),
        error="'sea' has 1 images to train on, 2 are needed; lower --shots",
    ),
    Kind("classes of two images", lambda p: table(p / "x", [f"u{n // 2}" for n in range(60)]), error="give others by"),
    Kind("99 to 1", lambda p: table(p / "x", ["red"] * 198 + ["blue"] * 2), ("--balance",), says="by class"),
    Kind("odd names", lambda p: table(p / "x", ODD[:4] * 10, square)),
    Kind("more odd names", lambda p: table(p / "x", ODD[4:] * 10, square)),
    Kind("equal but for case", lambda p: table(p / "x", ["red", "Red", "ＲＥＤ", "sea"] * 9), says="in case or spaces"),
    Kind("half without label", lambda p: table(p / "x", ["", "red", "", "blue"] * 12), error="label' is empty"),
    Kind("null labels", lambda p: shard(p, [None, "red", float("nan"), "blue", " "] * 9), ("--label", "kind"), "empty"),
    Kind("numbers as labels", lambda p: shard(p, [7, 0, 2.5, 10] * 12), ("--label", "kind"), least=0.9),
    Kind("modes of pixels", lambda p: table(p / "x", FOUR * 2, of_modes), least=0.6),
    Kind("sizes of images", lambda p: table(p / "x", FOUR, of_sizes), least=0.6),
    Kind("an image for all", lambda p: table(p / "x", FOUR, lambda n: square(0)), says="is no better than"),
    Kind("mixed with nothing", lambda p: table(p / "x", FOUR), ("--alpha", "0"), says="gain: +0.0 points"),
    Kind("mixed without names", lambda p: table(p / "x", ["0", "1.5"] * 20), ("--alpha", "0.5"), "needs class names"),
    Kind("no share", lambda p: table(p / "x", FOUR), ("--alpha", "nan"), "--alpha 'nan'"),
    Kind("no rate", lambda p: table(p / "x", FOUR), ("--method", "full", "--lr", "nan"), "--lr nan"),
    Kind("a negative rate", lambda p: table(p / "x", FOUR), ("--method", "full", "--lr", "-1"), "--lr -1"),
    Kind(
        "a rate that diverges",
        lambda p: table(p / "x", FOUR),
        ("--method", "lp-ft", "--lr", "1e30", "--epochs", "1"),
        least=0.9,
    ),
    Kind(
        "a rate that diverges unseen",
        lambda p: table(p / "x", NAMES * 3),
        ("--method", "full", "--lr", "1e30", "--epochs", "1"),
        error="learning rate of 1e+30 ended with weights that are not finite; lower it",
    ),
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_classifier_or_one_line(
    kind: Kind, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused data leave no file; of others comes a classifier with finite weights, which classifies an image, and what
    may be wrong is said."""
    out = tmp_path / "out"
    command = ("finetune", model_folder, kind.data(tmp_path), *kind.options, "--out", out)
    if kind.error is not None:
        assert kind.error in refused(capsys, *command)
        assert not list(out.glob("*"))
        return
    run(*command)
    assert kind.says in capsys.readouterr().out
    classifier = load_classifier(out)
    found = json.loads((out / "classifier.json").read_text(encoding="utf-8"))["figures"]
    assert found["mean_per_class_recall"] >= kind.least
    (answer,) = classifier.predict([square(0)])
    assert sum(answer.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (["red", "blue"], ""),
        (["violet"], "'violet' has no image to train on"),
        (None, "48 of 48 test images are trained"),
    ],
)
def test_test_images_of_other_classes_or_the_same(
    labels: list[str] | None, says: str, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Classes that the test lacks are counted; classes that only the test has, and the training images as test images,
    are refused."""
    data = table(tmp_path / "x", FOUR)
    test = data if labels is None else table(tmp_path / "y", labels * 5)
    command = ("finetune", model_folder, data, "--test", test)
    if says:
        assert says in refused(capsys, *command)
    else:
        run(*command)
        assert "2 of 4 classes have no test image" in capsys.readouterr().out
