"""Drawings of predictions, and the images of a folder. No model is needed."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmssl.errors import UserError
from mmssl.inference import ImageInput, list_images, predict, probabilities
from mmssl.inference.classify import Prediction, draw_prediction
from mmssl.inference.images import pixels_of


def coin(images: Sequence[ImageInput]) -> list[probabilities.LabelProbabilities]:
    return [probabilities.LabelProbabilities({"tails": 0.4, "heads": 0.6}) for _ in images]


def photo(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 8), "red").save(path)
    return path


def test_a_drawing_lies_beside_its_image_also_where_names_have_spaces(tmp_path: Path) -> None:
    """The folder stays as it is called; in the file's own name spaces become hyphens."""
    path = photo(tmp_path / "my photos" / "a cat.png")
    (found,) = predict([path], coin, save=True)
    assert found.saved == tmp_path / "my photos" / "a-cat-predicted.png"
    assert found.saved.is_file()
    assert [place.name for place in tmp_path.iterdir()] == ["my photos"]


def test_the_number_on_a_long_bar_can_be_read(tmp_path: Path) -> None:
    """A number that stands in the dark bar is white, and one beside the bar is black."""
    prediction = Prediction("a.png", {"cat": 0.99, "dog": 0.01})
    draw_prediction(tmp_path / "drawn.png", Image.new("RGB", (8, 8), "red"), prediction)
    pixels = np.asarray(Image.open(tmp_path / "drawn.png").convert("RGB")).astype(int)
    bar = (abs(pixels - (0x1D, 0x4E, 0xD8)) < 8).all(2)  # plotting.BLUE
    rows, columns = (np.flatnonzero(bar.any(axis)) for axis in (1, 0))
    inside = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    assert (inside.min(2) > 240).any()
    assert not (inside.max(2) < 60).any()
    assert (pixels[rows[-1] + 1 :, columns[0] :].max(2) < 60).any()


def test_drawings_are_no_images_of_their_folder(tmp_path: Path) -> None:
    """A folder gives the same files before and after its images were drawn beside them; a drawing can be named."""
    photo(tmp_path / "a.png")
    before = list_images([tmp_path])
    (drawn,) = predict(before, coin, save=True)
    assert drawn.saved is not None
    assert list_images([tmp_path]) == before
    assert list_images([drawn.saved]) == [drawn.saved]


def test_a_folder_that_cannot_be_drawn_into_is_named(tmp_path: Path) -> None:
    """One line with the place and what to do."""
    path = photo(tmp_path / "a.png")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/a-predicted\.png cannot be written.*name another folder"):
        list(predict([path], coin, save=tmp_path / "file"))


def hues(images: Sequence[ImageInput]) -> list[probabilities.LabelProbabilities]:
    """Reads each image, as a model would: broken ones raise DecodeError."""
    return [probabilities.LabelProbabilities({str(pixels_of(image)[0, 0, 0]): 1.0}) for image in images]


def test_broken_files_are_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One broken file costs its own prediction only: the others keep their names and drawings, in order, and a warning
    names it. Beyond the limit, or without a usable image, the prediction is refused."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(5):
        Image.new("RGB", (9, 9), (number, 0, 0)).save(folder / f"{number}.png")
    (folder / "2.png").write_bytes(b"no image")
    truncated = Image.open(io.BytesIO((folder / "3.png").read_bytes()[:48]))
    found = list(predict([*list_images([folder]), truncated], hues, save=tmp_path / "drawn"))
    assert [(Path(p.image).name, p.label) for p in found] == [(f"{n}.png", str(n)) for n in (0, 1, 3, 4)]
    assert [p.saved.name for p in found if p.saved] == [f"{n}-predicted.png" for n in (0, 1, 3, 4)]
    assert "2 of 6 images are left out" in caplog.text
    assert "2.png" in caplog.text
    with pytest.raises(UserError, match=r"1 of 5 samples cannot be used.*--bad-images"):
        list(predict(list_images([folder]), hues, bad_images=0))
    with pytest.raises(UserError, match=r"2\.png is not a usable image"):
        list(predict([folder / "2.png"], hues))


def test_the_highest_comes_first() -> None:
    """Whatever the order in which the classifier gives them."""
    (found,) = predict([Image.new("RGB", (4, 4))], coin)
    assert (found.label, found.probability, list(found.probabilities)) == ("heads", 0.6, ["heads", "tails"])
    assert str(found) == "image 1: heads 60.0%, tails 40.0%"
