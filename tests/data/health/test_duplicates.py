"""Copies are found whatever was done to them, and different images are not called copies."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from skimage import data

from mmssl.data.health.duplicates import (
    Fingerprint,
    KnownImages,
    _distance,
    connect,
    equal_pairs,
    near_duplicates,
    sorted_words,
    thumbnail,
)
from tests.helpers.images import encode


def images() -> list[Image.Image]:
    """Different photographs and parts of them."""
    sources = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket(), data.immunohistochemistry()]
    return [Image.fromarray(s[y : y + 150, x : x + 200]) for s in sources for y in (0, 150) for x in (0, 200)]


def copies(image: Image.Image) -> list[Image.Image]:
    """The same image, smaller, compressed, lighter."""
    strong = Image.open(io.BytesIO(encode(image, "JPEG", quality=60)))
    return [image, image.resize((93, 71)), strong, ImageEnhance.Brightness(image).enhance(1.01)]


def test_near_images_are_the_transformed_ones() -> None:
    """Each image's smaller, recompressed and lightened copies are tied to it, and to nothing else."""
    originals = images()
    thumbs = np.stack([thumbnail(np.array(copy.convert("RGB"))) for p in originals for copy in copies(p)])
    groups = connect(len(thumbs), near_duplicates(thumbs))
    np.testing.assert_array_equal(groups, np.repeat(np.arange(len(originals)) * 4, 4))


def test_near_images_against_all_pairs() -> None:
    """On thousands of noisy copies the sorted search finds what comparing every pair finds."""
    rng = np.random.default_rng(0)
    base = rng.integers(0, 256, (300, 12, 12, 3))
    noisy = (base[rng.integers(0, 300, 1500)] + rng.integers(-2, 3, (1500, 12, 12, 3))).clip(0, 255).astype(np.uint8)
    flat = noisy.reshape(1500, -1).astype(int)
    every = {(i, j) for i in range(1500) for j in np.flatnonzero(np.abs(flat[i + 1 :] - flat[i]).mean(1) < 4) + i + 1}
    found = set(map(tuple, near_duplicates(noisy).tolist()))
    assert found <= every
    pairs = np.array(sorted(every))
    np.testing.assert_array_equal(connect(1500, np.array(sorted(found))), connect(1500, pairs))


@pytest.mark.parametrize("count", [0, 1, 60])
def test_known_images_against_all_pairs(count: int) -> None:
    """An image has a copy among known ones exactly if comparing it with each of them finds one; bytes alike suffice."""
    rng = np.random.default_rng(count)
    base = rng.integers(0, 256, (20, 12, 12, 3))
    noisy = (base[rng.integers(0, 20, count + 12)] + rng.integers(-3, 4, (count + 12, 12, 12, 3))).clip(0, 255)
    prints = [Fingerprint(bytes([0, i % 256, i // 256]), thumb) for i, thumb in enumerate(noisy.astype(np.uint8))]
    known = KnownImages([f"k{i}" for i in range(count)], prints[:count])
    for image in prints[count:]:
        close = [
            f"k{i}"
            for i, other in enumerate(prints[:count])
            if len(near_duplicates(np.stack([image.thumbnail, other.thumbnail])))
        ]
        assert known.copy_of(image) == (close[0] if close else None)
        assert not known.is_exact(image)
    unlike = np.zeros((12, 12, 3), np.uint8)
    for i, image in enumerate(prints[:count]):
        assert known.copy_of(Fingerprint(image.digest, unlike)) == f"k{i}"
        assert known.is_exact(image)


def test_differing_signs_are_counted() -> None:
    """The number of differing bits is that of Python's integers, with one row or many on the other side."""
    one, other = np.random.default_rng(0).integers(0, 256, (2, 500, 8), dtype=np.uint8)
    counts = [(int.from_bytes(a) ^ int.from_bytes(b)).bit_count() for a, b in zip(one, other, strict=True)]
    assert _distance(one, other).tolist() == counts
    counts = [(int.from_bytes(a) ^ int.from_bytes(other[7])).bit_count() for a in one]
    assert _distance(one, other[7:8]).tolist() == counts


def test_faint_drawings_are_no_copies() -> None:
    """Two faint drawings on white hardly differ in pixels, but as much as they differ from a blank page."""
    pages = np.full((2, 96, 96, 3), 255, np.uint8)
    pages[0, 20:24, 10:80] = 215
    pages[1, 10:80, 60:64] = 215
    assert near_duplicates(np.stack([thumbnail(page) for page in pages])).shape == (0, 2)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_images(count: int) -> None:
    """No image, one, and two equal ones."""
    thumbs = np.tile(thumbnail(np.array(images()[0]))[None], (count, 1, 1, 1))
    assert near_duplicates(thumbs).tolist() == ([[0, 1]] if count == 2 else [])


def test_same_ties_to_the_first() -> None:
    """Every repetition is tied to the first item with its key."""
    assert equal_pairs(["a", "b", "a", "c", "b", "a"]).tolist() == [[0, 2], [1, 4], [0, 5]]
    assert equal_pairs([]).shape == (0, 2)


@given(st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=40))
def test_connect_gives_connected_components(pairs: list[tuple[int, int]]) -> None:
    """The groups are SciPy's connected components, each named by its smallest item."""
    array = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    graph = coo_matrix((np.ones(len(array)), (array[:, 0], array[:, 1])), shape=(30, 30))
    labels = connected_components(graph, directed=False)[1]
    smallest = np.array([np.flatnonzero(labels == label)[0] for label in labels])
    np.testing.assert_array_equal(connect(30, array), smallest)
    half = len(array) // 2
    np.testing.assert_array_equal(connect(30, array[:half], array[half:]), smallest)


def test_words_of_ignore_order_case_and_punctuation() -> None:
    """Captions with the same words are near; those without words count as they stand."""
    assert sorted_words("A red FOX, jumping!") == sorted_words("jumping: a fox (red)")
    assert sorted_words("a red fox") != sorted_words("a red red fox")
    assert sorted_words("!!") != sorted_words("??")
    assert sorted_words("Straße") == sorted_words("STRASSE")
