"""Drawings of predictions, and the images of a folder. No model is needed."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from mmssl.errors import UserError
from mmssl.inference import ImageInput, list_images, predict


def coin(images: Sequence[ImageInput]) -> list[dict[str, float]]:
    return [{"tails": 0.4, "heads": 0.6} for _ in images]


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


def test_the_highest_comes_first() -> None:
    """Whatever the order in which the classifier gives them."""
    (found,) = predict([Image.new("RGB", (4, 4))], coin)
    assert (found.label, found.probability, list(found.probabilities)) == ("heads", 0.6, ["heads", "tails"])
    assert str(found) == "image 1: heads 60.0%, tails 40.0%"
