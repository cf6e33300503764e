"""What a loaded model takes, and what it says about the texts it encodes."""

import io
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mmssl
from mmssl.errors import UserError
from mmssl.evaluate.prompts import imagenet_classnames
from mmssl.inference import zero_shot
from tests.helpers.images import encode, orientation, photo

MODEL = Path(__file__).parents[1] / "golden" / "model"


@pytest.mark.parametrize(
    ("texts", "parts"),
    [
        (["a cat", "日本", "日 a", "x"], ["of 4 captions", "2 (50.0%) hold letters or words"]),
        (["a cat"] * 7 + ["a " * 90], ["of 8 captions", "1 (12.5%) are cut at 77 tokens"]),
        (["a " * 90, "日本"], ["1 (50.0%) are cut", "1 (50.0%) hold"]),
    ],
)
def test_lost_words_are_reported_once(texts: list[str], parts: list[str], caplog: pytest.LogCaptureFixture) -> None:
    """One warning gives the shares of captions that are cut or hold unknown tokens, over all batches of a call."""
    model = mmssl.load(MODEL)
    with caplog.at_level(logging.WARNING):
        model.encode_text(["a cat"] * 3)
        assert not caplog.messages
        model.encode_text(texts, batch_size=3)
        model.encode_text(texts)
    (message,) = caplog.messages
    assert all(part in message for part in parts)


def test_an_image_is_one_in_any_form() -> None:
    """Paths, bytes, open files, generators, PIL images, arrays and tensors of one image have one embedding; one text is
    one label."""
    model = mmssl.load(MODEL)
    image, content = photo(40, 30), encode(photo(40, 30), "PNG", exif=orientation(6))
    expected = model.encode_image(content)
    upright = np.asarray(image.rotate(-90, expand=True))
    forms = [io.BytesIO(content), bytearray(content), Image.open(io.BytesIO(content)), upright]
    forms += [torch.from_numpy(upright.copy()).permute(2, 0, 1), upright / 255.0]
    for form in forms:
        assert torch.allclose(model.encode_image(form), expected, atol=1e-6)
    several = model.encode_image(iter([content, io.BytesIO(content)]), batch_size=1)
    assert torch.allclose(several, expected.expand(2, -1), atol=1e-6)
    assert torch.equal(model.encode_image(np.stack([upright] * 2)), model.encode_image([upright] * 2))
    assert model.classify(io.BytesIO(content), "a cat") == {"a cat": 1.0}
    assert list(model.classify(content, (word for word in ("a", "b"))))
    assert torch.equal(model.encode_text(word for word in ("a", "b")), model.encode_text(["a", "b"]))


def noise(model: mmssl.Model) -> torch.Tensor:
    """Random floats from 0 to 1 of the size that the tower takes."""
    return torch.rand(1, 3, model.vision.image_size, model.vision.image_size)


REFUSED: dict[str, tuple[Callable[[mmssl.Model], object], str]] = {
    "batch of -1 images": (lambda m: m.encode_image(photo(9, 9), -1), "batch_size=-1: give a number of 1 or more"),
    "batch of no texts": (lambda m: m.encode_text("a", 0), "batch_size=0"),
    "a number as image": (lambda m: m.encode_image(3), "expected an image .* found a int"),  # type: ignore[arg-type]
    "None among images": (lambda m: m.encode_image([photo(9, 9), None]), "found a NoneType"),  # type: ignore[list-item]
    "a text file": (lambda m: m.encode_image(io.StringIO("x")), "found a StringIO"),  # type: ignore[arg-type]
    "a number as text": (lambda m: m.encode_text(["a", 3]), "expected texts, found a int"),  # type: ignore[list-item]
    "a number as label": (lambda m: m.classify(photo(9, 9), [3]), "expected labels"),  # type: ignore[list-item]
    "no label": (lambda m: m.classify(photo(9, 9), []), "labels are missing"),
    "several images": (lambda m: m.classify([photo(9, 9)] * 2, "a"), "found 2; predict"),  # type: ignore[arg-type]
    "normalised pixels": (
        lambda m: m.vision(noise(m) - 0.5),
        "takes uint8 pixels, or floats in 0..255",
    ),
    "pixels from 0 to 1": (lambda m: m.vision(noise(m)), "these are floats from"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_arguments_are_refused_in_words(case: str) -> None:
    """Each says what is wanted and what was found."""
    model = mmssl.load(MODEL)
    call, words = REFUSED[case]
    with pytest.raises(UserError, match=words), torch.no_grad():
        call(model)


def test_the_tower_takes_pixels_as_floats_too() -> None:
    """uint8 pixels and the same as floats give the same; so does a black image."""
    model = mmssl.load(MODEL)
    side = model.vision.image_size
    pixels = torch.randint(256, (2, 3, side, side), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pixels[1] = 0
    for part in (pixels, pixels[1:]):
        with torch.no_grad():
            assert torch.equal(model.vision(part).pooled, model.vision(part.float()).pooled)


def test_imagenets_names_are_labels_although_some_are_equal() -> None:
    """Equal names get their class number in the results, and the same probability; given by hand they are refused."""
    model, names = mmssl.load(MODEL), imagenet_classnames()
    found = zero_shot(model, names, numbered=True)([photo(40, 30)])[0]
    assert len(found) == 1000
    twice = [name for name, count in Counter(names).items() if count > 1]
    assert twice
    for name in twice:
        first, second = (found[f"{name} ({n})"] for n, other in enumerate(names) if other == name)
        assert first == pytest.approx(second)
    with pytest.raises(UserError, match="is repeated"):
        zero_shot(model, names)
