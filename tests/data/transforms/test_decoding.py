"""Decoding: Pillow's full decode is the oracle; broken and hostile images end in DecodeError alone."""

import io
import pickle
import random
import struct
import tracemalloc
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from mmssl.data.transforms import caps
from mmssl.data.transforms.caps import DecodeError
from mmssl.data.transforms.decoding import Header, decode, read_header
from tests.helpers.images import encode, mean_difference, orientation, photo, png_of, psnr

JPEGS = [
    {"subsampling": "4:4:4"},
    {"subsampling": "4:2:2"},
    {"subsampling": "4:2:0"},
    {"subsampling": "4:2:0", "progressive": True},
    {"quality": 30},
    {"restart_marker_rows": 1},
]


def pillow(image: bytes) -> Image.Image:
    """The oracle's upright image, still in its own mode."""
    return ImageOps.exif_transpose(Image.open(io.BytesIO(image)))


@pytest.mark.parametrize("options", JPEGS, ids=str)
def test_jpeg_equals_pillow(options: dict[str, Any]) -> None:
    """A full JPEG decode differs from Pillow's by less than 1/255 on average, for every chroma layout."""
    image = encode(photo(301, 203), "JPEG", **options)
    assert read_header(image) == Header("JPEG", 203, 301, reducible=True)
    assert mean_difference(decode(image), pillow(image)) < 0.02


@pytest.mark.parametrize("reduce", [2, 4, 8])
def test_jpeg_decodes_smaller(reduce: int) -> None:
    """A reduced decode has the size rounded up and shows the box-averaged full decode."""
    image = encode(photo(301, 203), "JPEG", quality=95, subsampling="4:4:4")
    small = decode(image, reduce=reduce)
    rows, columns = 301 // reduce, 203 // reduce  # boxes that are whole
    assert small.shape == (-(-301 // reduce), -(-203 // reduce), 3)
    averaged = np.asarray(pillow(image).reduce(reduce))[:rows, :columns]
    assert psnr(small[:rows, :columns], averaged) > 28


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P"])
@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "GIF", "WEBP"])
def test_opaque_formats_equal_pillow(format: str, mode: str) -> None:
    """Every lossless format and pixel kind gives exactly Pillow's RGB."""
    image = photo().convert(mode)
    content = encode(
        image.convert("RGB") if format == "WEBP" else image,
        format,
        **({"lossless": True} if format == "WEBP" else {}),
    )
    assert read_header(content) == Header(format, 400, 300)
    np.testing.assert_array_equal(decode(content), pillow(content).convert("RGB"))


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_cmyk_equals_pillow(format: str) -> None:
    """Four inks become RGB by Pillow, also Adobe's inverted JPEGs."""
    image = encode(photo().convert("CMYK"), format)
    assert not read_header(image).reducible
    np.testing.assert_array_equal(decode(image, reduce=2), pillow(image).convert("RGB"))


def test_gray_jpeg() -> None:
    """A gray JPEG becomes three equal planes."""
    pixels = decode(encode(photo().convert("L"), "JPEG"))
    assert pixels.shape == (300, 400, 3)
    np.testing.assert_array_equal(pixels[..., 0], pixels[..., 2])


@pytest.mark.parametrize(("format", "mode"), [("PNG", "RGBA"), ("PNG", "LA"), ("WEBP", "RGBA"), ("TIFF", "RGBA")])
def test_transparency_is_laid_on_white(format: str, mode: str) -> None:
    """With alpha a, the pixel is a * colour + (1 - a) * white, to the rounding."""
    image = photo().convert(mode[:-1])
    alpha = Image.fromarray(np.tile(np.linspace(0, 255, 400).astype(np.uint8), (300, 1)))
    image.putalpha(alpha)
    content = encode(image, format, **({"lossless": True, "exact": True} if format == "WEBP" else {}))
    weight = np.asarray(alpha, np.float64)[..., None] / 255
    expected = weight * np.asarray(photo().convert(mode[:-1]).convert("RGB"), np.float64) + (1 - weight) * 255
    assert np.abs(decode(content) - expected).max() <= 1


def test_palette_transparency_is_laid_on_white() -> None:
    """The transparent entry of a palette, and a transparent plain colour, show white."""
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 200, 30, 40])
    image.paste(0, (0, 0, 4, 8))
    for content in (encode(image, "PNG", transparency=0), encode(image, "GIF", transparency=0)):
        pixels = decode(content)
        assert (pixels[:, :4] == 255).all()
        assert (pixels[:, 4:] == [200, 30, 40]).all()
    plain = encode(image.convert("RGB"), "PNG", transparency=(0, 0, 0))
    np.testing.assert_array_equal(decode(plain), decode(content))


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits_keep_their_range(format: str) -> None:
    """A 16-bit gray value v shows as round(v / 257); Pillow's own conversion would clip at 255."""
    wide = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    pixels = decode(encode(Image.fromarray(wide), format))
    np.testing.assert_array_equal(pixels[..., 1], np.floor(wide / 257 + 0.5))


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("format", ["PNG", "TIFF", "JPEG2000"])
def test_bits_in_wider_integers_fill_the_range(format: str, bits: int) -> None:
    """Gray of 8 to 16 bits in 16-bit pixels: zero is black, the largest value of its bits is white, linear between."""
    wide = np.linspace(0, 2**bits - 1, 64 * 64).round().astype(np.uint16).reshape(64, 64)
    options = {"irreversible": False} if format == "JPEG2000" else {}
    found = decode(encode(Image.fromarray(wide), format, **options))
    expected = np.rint(wide.astype(np.float64) * 255 / (2**bits - 1))
    assert np.array_equal(found, np.repeat(expected[..., None], 3, axis=2))


@pytest.mark.parametrize("bands", [1, 3])
@pytest.mark.parametrize("white", [1, 100, 254, 511, 1023, 4095])
def test_portable_maps_with_any_white(bands: int, white: int) -> None:
    """Binary PGM and PPM name their own white: v shows as round(255 v / white). A cut one is an error."""
    values = np.random.default_rng(white).integers(0, white + 1, (9, 7, bands))
    values[0, 0] = white
    head = b"P%d\n7 9\n%d\n" % (5 if bands == 1 else 6, white)
    image = head + values.astype(np.uint8 if white < 256 else ">u2").tobytes()
    expected = np.floor(values * 255 / white + 0.5)
    np.testing.assert_array_equal(decode(image), np.broadcast_to(expected, (9, 7, 3)))
    with pytest.raises(DecodeError, match="broken or cut"):
        decode(image[:-1])


@pytest.mark.parametrize(("low", "high"), [(-1024, 3071), (-5, 5), (0, 100_000), (70_000, 2_000_000_000), (-9, -3)])
def test_wider_and_negative_integers_are_scaled_to_their_range(low: int, high: int) -> None:
    """32-bit gray beyond 16 bits, and negative values such as Hounsfield units: smallest black, largest white."""
    wide = np.linspace(low, high, 64 * 64).round().astype(np.int32).reshape(64, 64)
    found = decode(encode(Image.fromarray(wide), "TIFF"))
    expected = (wide.astype(np.float64) - low) * 255 / (high - low)
    assert np.abs(found[..., 0] - expected).max() <= 0.5
    assert (found[0, 0, 0], found[-1, -1, 0]) == (0, 255)


@pytest.mark.parametrize(("low", "high", "black"), [(0.0, 1.0, 0), (0.25, 0.5, 64), (-3.0, 7.0, 0), (0.0, 255.0, 0)])
def test_float_pixels_are_scaled(low: float, high: float, black: int) -> None:
    """Floats from 0 to 1 are fractions of white; others are scaled from their smallest to their largest."""
    wide = np.linspace(low, high, 64 * 64, dtype=np.float32).reshape(64, 64)
    found = decode(encode(Image.fromarray(wide), "TIFF"))
    assert found[0, 0, 0] == black
    assert found[-1, -1, 0] == (128 if high == 0.5 else 255)
    assert (np.diff(found[..., 0].ravel().astype(int)) >= 0).all()


@pytest.mark.parametrize("value", [0.0, 0.5, float("nan"), float("inf")])
def test_float_pixels_without_a_range_are_refused(value: float) -> None:
    """Equal floats, and floats that are not finite, have no known range."""
    gray = np.zeros((4, 4), np.float32) + np.float32(value)
    with pytest.raises(DecodeError, match="floating-point"):
        decode(encode(Image.fromarray(gray), "TIFF"))


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("AVIF", {"quality": 100}),
        ("JPEG2000", {}),
        ("JPEG2000", {"no_jp2": True}),
        ("PPM", {}),
        ("QOI", {}),
        ("TIFF", {"big_tiff": True}),
    ],
)
def test_further_formats_equal_pillow(format: str, options: dict[str, Any]) -> None:
    """Formats that Pillow reads by itself give exactly Pillow's RGB."""
    content = encode(photo(), format, **options)
    assert np.array_equal(decode(content), np.asarray(pillow(content).convert("RGB")))
    assert read_header(content).width == 400


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "the image is empty"),
        (b"\0\0\0\x18ftypheic" + bytes(40), "HEIC"),
        (b"\0\0\0\x18ftypmif1" + bytes(40), "HEIC"),
        (b"\0\0\0\x18ftypisom" + bytes(40), "a video"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"<?xml version='1.0'?>\n<svg/>", "SVG"),
        (b"%PDF-1.7", "a PDF"),
        (bytes(128) + b"DICM" + bytes(40), "DICOM"),
        (b"\xff\x0a" + bytes(40), "JPEG XL"),
        (b"<!DOCTYPE html><html>", "a web page"),
    ],
)
def test_formats_that_are_not_read_are_named(content: bytes, says: str) -> None:
    """What is no readable image is called by its name, with what to do."""
    with pytest.raises(DecodeError, match=says) as error:
        decode(content)
    assert "convert" in str(error.value) or "again" in str(error.value)


def test_animation_shows_its_first_frame() -> None:
    """Of an animated GIF or WebP the first frame counts."""
    frames = [photo(), ImageOps.invert(photo())]
    for format, options in (("GIF", {}), ("WEBP", {"lossless": True})):
        image = encode(frames[0], format, save_all=True, append_images=frames[1:], **options)
        assert Image.open(io.BytesIO(image)).n_frames == 2
        assert mean_difference(decode(image), frames[0]) < 15


@pytest.mark.parametrize("value", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation(format: str, value: int) -> None:
    """All eight orientations come out as Pillow's exif_transpose shows them, and the header agrees."""
    image = encode(photo(96, 64), format, exif=orientation(value))
    header, pixels = read_header(image), decode(image)
    assert (header.height, header.width) == pixels.shape[:2]
    assert mean_difference(pixels, pillow(image).convert("RGB")) < 0.02
    if format == "JPEG":
        assert decode(image, reduce=2).shape == (header.height // 2, header.width // 2, 3)


def test_nonsense_exif_is_upright() -> None:
    """An EXIF block that is cut or absurd leaves the image as stored."""
    plain = encode(photo(96, 64), "JPEG")
    blocks = [
        b"",
        b"MM",
        b"II*\x00\xff\xff\xff\x7f",  # the directory lies outside
        b"II*\x00\x08\x00\x00\x00\x09\x00\x12\x01",  # the directory is cut
        b"II*\x00\x08\x00\x00\x00\x01\x00" + struct.pack("<HHII", 0x0112, 3, 1, 99),
    ]
    for block in blocks:
        body = b"Exif\x00\x00" + block
        image = plain[:2] + b"\xff\xe1" + (len(body) + 2).to_bytes(2, "big") + body + plain[2:]
        np.testing.assert_array_equal(decode(image), decode(plain))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "BMP", "TIFF"])
def test_header_needs_no_pixels(format: str) -> None:
    """The header is read from a file whose pixels are missing."""
    image = encode(photo(), format)
    kept = image[: len(image) // 2]
    assert read_header(kept) == read_header(image)


@pytest.mark.parametrize(
    "image",
    [
        png_of(30_000, 20_000),
        encode(Image.new("L", (1, 1)), "BMP").replace(
            b"\x01\x00\x00\x00\x01\x00\x00\x00", b"\x30\x75\x00\x00\x20\x4e\x00\x00", 1
        ),
        b"GIF89a" + b"\xff\xff\xff\xff" + b"\x00\x00\x00,\x00\x00\x00\x00\x01\x00\x01\x00\x00\x02\x02\x4c\x01\x00;",
        b"RIFF\x1e\x00\x00\x00WEBPVP8X\x0a\x00\x00\x00"
        + b"\x00\x00\x00\x00"
        + b"\xff\xff\x00\xff\xff\x00"
        + b"VP8L\x00\x00\x00\x00",
    ],
    ids=["png", "bmp", "gif", "webp"],
)
def test_too_many_pixels_are_refused_before_decoding(image: bytes) -> None:
    """A few bytes that claim hundreds of megapixels are refused in one line, without Pillow's own wording."""
    with pytest.raises(DecodeError) as caught:
        decode(image)
    assert "\n" not in str(caught.value)
    assert "bomb" not in str(caught.value)


def test_pixel_cap_names_size_and_option() -> None:
    """The message gives the size, the limit and the option to change; the cap is the caller's."""
    image = encode(photo(100, 200), "JPEG")
    with pytest.raises(DecodeError, match=r"200 x 100 pixels.*19,999.*data\.max_pixels"):
        read_header(image, max_pixels=19_999)
    assert read_header(image, max_pixels=20_000).width == 200


def test_cap_above_pillows_own() -> None:
    """A cap above Pillow's global one is honoured: the caller decides."""
    assert read_header(png_of(30_000, 20_000), max_pixels=10**9).width == 30_000


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("WEBP", {}),
        ("GIF", {}),
        ("BMP", {}),
        ("TIFF", {}),
    ],
    ids=str,
)
def test_cut_images_are_errors(format: str, options: dict[str, Any]) -> None:
    """Cut anywhere, an image is an error, or nothing of it was lost."""
    image = encode(photo(64, 48), format, **options)
    whole = decode(image)
    lost = 0
    for length in {*range(0, len(image), max(1, len(image) // 150)), *range(len(image) - 20, len(image))}:
        try:
            np.testing.assert_array_equal(decode(image[:length]), whole)
        except DecodeError:
            lost += 1
    assert lost > 100


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_flipped_bits(format: str) -> None:
    """Random bit flips end in an image or in DecodeError: no crash, no other exception."""
    exif = {"exif": orientation(6)} if format in ("JPEG", "PNG", "WEBP") else {}
    image = encode(photo(48, 64), format, **exif)
    rng = random.Random(format)
    outcomes = set()
    for _ in range(300):
        broken = bytearray(image)
        for _ in range(rng.randint(1, 4)):
            # Half of the flips hit the first bytes, where the structure is.
            at = rng.randrange(min(len(broken), 120) if rng.random() < 0.5 else len(broken))
            broken[at] ^= 1 << rng.randrange(8)
        try:
            header = read_header(bytes(broken), max_pixels=4_000_000)
            pixels = decode(bytes(broken), header)
            assert pixels.dtype == np.uint8
            assert pixels.shape[2] == 3
            outcomes.add("image")
        except DecodeError:
            outcomes.add("error")
    assert outcomes == {"image", "error"}


def test_large_16_bit_images_need_little_memory() -> None:
    """Nine bytes per pixel at most, with three for what it becomes and those of Pillow's own copies."""
    wide = np.random.default_rng(0).integers(0, 65536, (600, 1000), dtype=np.uint16)
    image = encode(Image.fromarray(wide), "PNG")
    tracemalloc.start()
    decode(image)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 9 * wide.size


@pytest.mark.parametrize(
    "image",
    [
        b"",
        b"\xff\xd8\xff",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        pickle.dumps(print),
        b"<svg/>",
        bytes(4096),
    ],
    ids=["empty", "start of JPEG", "PostScript", "pickle", "SVG", "zeros"],
)
def test_other_things_are_refused(image: bytes) -> None:
    """Other formats are refused by their first bytes; no reader that runs programs is tried."""
    with pytest.raises(DecodeError):
        decode(image)


def test_scans_of_a_jpeg_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """On 500 random texts of markers the number of scans is that of `bytes.count`: allowed, and refused one below."""
    random_bytes = random.Random(0)
    for _ in range(500):
        image = bytes(random_bytes.choices([0xFF, 0xDA, 0, 1], k=random_bytes.randint(0, 60)))
        scans = image.count(b"\xff\xda")
        monkeypatch.setattr(caps, "_MAX_SCANS", scans)
        caps.check_scans(image, pixels=1)
        monkeypatch.setattr(caps, "_MAX_SCANS", scans - 1)
        with pytest.raises(DecodeError, match=f"the JPEG has {scans} scans"):
            caps.check_scans(image, pixels=1)
