"""Members of a tar: the names that hold images and texts, and what is read of a shard."""

from collections.abc import Iterable
from dataclasses import dataclass

_COMMON_IMAGES = ("jpg", "jpeg", "jfif", "jpe", "png", "webp", "gif", "bmp", "tif", "tiff")
_FURTHER_IMAGES = ("apng", "avif", "jp2", "j2k", "jpx", "ppm", "pgm", "pbm", "pnm", "qoi")
IMAGES = (*_COMMON_IMAGES, *_FURTHER_IMAGES)
"""Extensions of images. The format itself is recognised by the first bytes."""
IMAGE_SET = frozenset(IMAGES)
MAPPED_IMAGE, MAPPED_CAPTION = "image=", "caption="
"""Extensions that members get here which a `MemberNames` names. No file has them."""
IMAGE_NAMES = (MAPPED_IMAGE, *IMAGES)
TEXT_NAMES = (MAPPED_CAPTION, "txt", "json")
MASKS = ("mask.png", "seg.png")
"""Extensions of masks that give each pixel its class; the latter is WebDataset's own example."""
USED = (*IMAGE_NAMES, *TEXT_NAMES, "cls")
"""Extensions that are read, and `.npy` of zeros and ones. Other members (`.pyd`, `.pth` ...) are never decoded."""


@dataclass(frozen=True)
class MemberNames:
    """Members that hold the image and the caption, where they are not named as usual.

    `img_content` stands for KEY.img_content, `input.jpg` for KEY.input.jpg or, with a folder per sample, KEY/input.jpg.
    """

    image: tuple[str, ...] = ()
    caption: tuple[str, ...] = ()

    @classmethod
    def of(cls, image: Iterable[str] = (), caption: Iterable[str] = ()) -> "MemberNames":
        """Names in any case, with or without a leading dot."""
        return cls(*(tuple(name.removeprefix(".").lower() for name in names) for names in (image, caption)))

    def split(self, name: str) -> tuple[str, str] | None:
        """As `split_name`, with the extension of a named member replaced."""
        names = split_name(name)
        if names is None:
            return None
        key, extension = names
        folder, _, base = key.rpartition("/")
        for wanted, mapped in ((self.image, MAPPED_IMAGE), (self.caption, MAPPED_CAPTION)):
            for own in wanted:
                if extension == own or extension.endswith(f".{own}"):
                    return key, extension.removesuffix(own) + mapped
                if folder and f"{base}.{extension}".lower() == own:
                    return folder, mapped
        return names


USUAL_MEMBERS = MemberNames()


@dataclass(frozen=True)
class SampleLimits:
    """What is read of a shard: size limits, checked before a sample is read into memory, and names of members."""

    max_member_bytes: int = 64 << 20
    """A larger member makes its sample unusable."""
    members: MemberNames = USUAL_MEMBERS
    """Members that hold the image and the caption, beside the usual ones."""
    images: bool = True
    """A sample without an image is unusable."""

    @property
    def max_sample_bytes(self) -> int:
        """Largest span of a tar, in bytes, that one sample may have."""
        return 4 * self.max_member_bytes


def split_name(name: str) -> tuple[str, str] | None:
    """`a/b.seg.png` -> (`a/b`, `seg.png`): WebDataset's key and extension, or None for other and hidden names."""
    name = name.removeprefix("./")
    if "__MACOSX" in name and "__MACOSX" in name.split("/"):  # macOS's copies of attributes, which no program reads
        return None
    slash = name.rfind("/") + 1
    stem, dot, extension = name[slash:].partition(".")
    return (name[:slash] + stem, extension.lower()) if stem and dot and extension else None
