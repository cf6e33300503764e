"""Formats of images by their first bytes: Pillow's readers, and names and remedies for formats that are not read."""

from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    ImageFile,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    QoiImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

_CONVERT = "images of this kind are not read; convert them to JPEG or PNG"
_READERS: tuple[tuple[bytes, type[ImageFile.ImageFile]], ...] = (
    (b"\xff\xd8\xff", JpegImagePlugin.JpegImageFile),
    (b"\x89PNG\r\n\x1a\n", PngImagePlugin.PngImageFile),
    (b"GIF87a", GifImagePlugin.GifImageFile),
    (b"GIF89a", GifImagePlugin.GifImageFile),
    (b"BM", BmpImagePlugin.BmpImageFile),
    (b"II*\x00", TiffImagePlugin.TiffImageFile),
    (b"MM\x00*", TiffImagePlugin.TiffImageFile),
    (b"II+\x00", TiffImagePlugin.TiffImageFile),
    (b"MM\x00+", TiffImagePlugin.TiffImageFile),
    (b"\x00\x00\x00\x0cjP  ", Jpeg2KImagePlugin.Jpeg2KImageFile),
    (b"\xff\x4f\xff\x51", Jpeg2KImagePlugin.Jpeg2KImageFile),
    (b"qoif", QoiImagePlugin.QoiImageFile),
    *((b"P%d%c" % (kind, space), PpmImagePlugin.PpmImageFile) for kind in range(1, 7) for space in b"\n\r\t #"),
)
_BOXES = {b"avif": AvifImagePlugin.AvifImageFile, b"avis": AvifImagePlugin.AvifImageFile}
_UNREAD = (
    (b"%PDF", "a PDF"),
    (b"%!PS", "PostScript"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\x00\x00\x00\x0cJXL ", "JPEG XL"),
    (b"8BPS", "a Photoshop file"),
    (b"v/1\x01", "OpenEXR"),
    (b"#?RADIANCE", "Radiance HDR"),
    (b"SIMPLE  =", "FITS"),
    (b"\x00\x00\x01\x00", "an icon"),
    (b"\x1aE\xdf\xa3", "a video"),
)
_DICOM_AT = 128


def find_reader(image: bytes) -> type[ImageFile.ImageFile] | None:
    """Pillow's reader for an encoded image; None for formats that are not read."""
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        return WebPImagePlugin.WebPImageFile
    if image[4:8] == b"ftyp":
        return _BOXES.get(image[8:12])
    return next((reader for signature, reader in _READERS if image.startswith(signature)), None)


def describe_unread(image: bytes) -> str:
    """One line that says what the bytes are instead of an image that can be read, with a remedy."""
    begin = image[:64].lstrip().lower()
    name = next((name for signature, name in _UNREAD if image.startswith(signature)), None)
    if not image:
        return "the image is empty: 0 bytes; get it again"
    if image[4:8] == b"ftyp":
        is_heif = image[8:12] in (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
        name = "HEIC" if is_heif else "a video"
    elif image[_DICOM_AT : _DICOM_AT + 4] == b"DICM":
        name = "DICOM"
    elif begin.startswith((b"<svg", b"<?xml")) and b"<svg" in image[:4096].lower():
        name = "SVG"
    elif begin.startswith(b"<"):
        return "the image is a web page or XML, perhaps an error message; get the image again"
    if name is not None:
        return f"the image is {name}: {_CONVERT}"
    return (
        f"not a JPEG, PNG, WebP, AVIF, GIF, BMP, TIFF, JPEG 2000 or PPM image: {len(image)} bytes starting with "
        f"{image[:8]!r}"
    )
