"""No bytes of an image crash or hang a reader, or take memory beyond the caps."""

import struct
import time
from collections import Counter

import pytest

from mmssl.data.transforms.caps import MAX_SIDE, CostlyError, DecodeError
from mmssl.data.transforms.decoding import MAX_PIXELS, decode, read_header
from tests.helpers.hostile_images import hostile_image, qoi, resealed, rle_bmp, sound_images, tiled_tiff
from tests.helpers.images import png_of
from tests.helpers.memory import grows_less_than

CAP = 1_000_000
"""Largest image in pixels."""
SECONDS = 4.0
"""Longest time for one image: Pillow decodes a million pixels of QOI in two."""
GROWTH = 200 << 20
"""Bytes by which the process may grow."""


def run(seeds: range) -> Counter[bool]:
    """Decode mutated images; how many had pixels, and how many were refused."""
    outcomes: Counter[bool] = Counter()
    for seed in seeds:
        name, image = hostile_image(seed)
        begin, pixels, reason = time.process_time(), 0, ""
        try:
            pixels = decode(image, read_header(image, CAP)).size // 3
        except DecodeError as error:
            reason = str(error)
        outcomes[pixels > 0] += 1
        assert pixels <= CAP, (seed, name)
        assert "\n" not in reason, (seed, name)
        assert time.process_time() - begin < SECONDS, (seed, name)
    return outcomes


def test_every_kind_is_sound_before_it_is_mutated() -> None:
    """Each kind of the fuzzer is decoded, so that its mutations reach the decoder."""
    for name, image in sound_images().items():
        assert decode(image).ndim == 3, name


def test_mutated_images_are_decoded_or_refused() -> None:
    """500 of them, in 33 kinds: pixels within the cap, or one line; none takes long."""
    outcomes = run(range(500))
    assert min(outcomes[True], outcomes[False]) > 100


@pytest.mark.slow
def test_5_000_mutated_images_are_decoded_or_refused() -> None:
    """As above, and the process does not grow."""
    with grows_less_than(GROWTH):
        assert run(range(1000, 6000)).total() == 5000


def sized(name: str, width: int, height: int) -> bytes:
    """A sound image whose header names another size."""
    image = bytearray(sound_images()[name])
    big, little = (struct.pack(f"{order}II", width, height) for order in "><")
    match name:
        case "jpeg" | "jpeg cmyk":
            at = image.index(b"\xff\xc0") + 5
            image[at : at + 4] = struct.pack(">HH", height, width)
        case "jpeg progressive":
            at = image.index(b"\xff\xc2") + 5
            image[at : at + 4] = struct.pack(">HH", height, width)
        case "png":
            image[16:24] = big
        case "webp lossless":  # in its canvas
            image[24:30] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
        case "gif":
            image[6:10] = struct.pack("<HH", width, height)
        case "bmp":
            image[18:26] = little
        case "avif":
            at = image.index(b"ispe") + 8
            image[at : at + 8] = big
        case "j2k":
            image[8:16] = big
        case "jp2":  # in its codestream
            at = image.index(b"\xff\x4f\xff\x51") + 8
            image[at : at + 8] = big
        case "ppm":
            return b"P6 %d %d 255\n" % (width, height) + bytes(image[15:])
        case _:
            raise AssertionError(name)
    return resealed(bytes(image))


CLAIMING = ("jpeg", "jpeg cmyk", "jpeg progressive", "png", "webp lossless", "gif", "bmp", "avif", "j2k", "jp2", "ppm")
SIDE = 1 + int(MAX_PIXELS**0.5)


@pytest.mark.parametrize(
    "image",
    [
        *(pytest.param(sized(name, SIDE, SIDE), id=name) for name in CLAIMING),
        pytest.param(qoi(SIDE, SIDE, 3, b"\xfd" * 99), id="qoi"),
        pytest.param(tiled_tiff(SIDE, SIDE, (64, 48)), id="tiff"),
        pytest.param(tiled_tiff(64, 48, (SIDE, SIDE)), id="tiff of one large tile"),
        pytest.param(tiled_tiff(64, 48, (16, 16), 500_000, 1), id="tiff of many tiles"),
        pytest.param(rle_bmp(SIDE, SIDE, b"\0\1"), id="bmp with runs"),
        pytest.param(rle_bmp(1500, 1500, b"\0\1"), id="slow bmp"),
        pytest.param(b"P3 1500 1500 255\n", id="slow ppm"),
        pytest.param(png_of(MAX_SIDE + 1, 1), id="wide"),
        pytest.param(png_of(1, MAX_SIDE + 1), id="high"),
    ],
)
def test_costly_images_are_refused_before_a_pixel_is_decoded(image: bytes) -> None:
    """One pixel more than the default cap, in every format and wherever a reader would take memory for it; sides that
    are too long; slow formats. The refusal takes no time and no memory."""
    begin = time.process_time()
    with grows_less_than(20 << 20), pytest.raises(CostlyError, match=f"{SIDE} x {SIDE}|sides|slowly|parts"):
        read_header(image)
    assert time.process_time() - begin < 0.5


COUNT = 200_000


def parted(name: str, at: int, part: bytes, count: int = COUNT) -> bytes:
    """A sound image with many tiny parts inserted."""
    image = sound_images()[name]
    return image[:at] + part * count + image[at:]


@pytest.mark.parametrize(
    "image",
    [
        pytest.param(parted("png", 33, b"\0\0\0\0abcd\xed\x82\xcd\x11"), id="png chunks"),
        pytest.param(parted("jpeg cmyk", 2, b"\xff\xfe\0\2"), id="jpeg segments"),
        pytest.param(parted("gif", 13 + 768, b"!\xfe\1c\0"), id="gif comments"),
        pytest.param(parted("gif", 13 + 768, b"!\xfe" + (b"\xff" + b"c" * 255) * 20_000 + b"\0", 1), id="long comment"),
        pytest.param(parted("ppm", 3, b"#" + b"c" * COUNT + b"\n", 1), id="ppm comment"),
        pytest.param(parted("ppm plain", 21, b"#\n"), id="plain ppm comments"),
        pytest.param(parted("jp2", 12, b"\0\0\0\x08free"), id="jp2 boxes"),
        pytest.param(rle_bmp(10, 10, b"\5\5" * 3_000_000), id="runs", marks=pytest.mark.slow),
    ],
)
def test_images_of_tiny_parts_are_refused_soon(image: bytes) -> None:
    """Hundreds of thousands of empty chunks, segments, comments, boxes and runs, which readers in Python would take one
    by one, some in quadratic time."""
    begin = time.process_time()
    with pytest.raises(CostlyError, match="parts|comments"):
        decode(image)
    assert time.process_time() - begin < 8
