"""Samples with their images shrunk, kept on a local disk: large originals are read and decoded once."""

import tarfile
from dataclasses import dataclass

import simplejpeg

from mmssl.data.shards import SampleLimits, ShardIndex, is_remote
from mmssl.data.shards.groups import groups
from mmssl.data.shards.headers import TarError, padded
from mmssl.data.shards.tar import Archive
from mmssl.data.storage.disk_cache import DiskCache, Name
from mmssl.data.transforms import DecodeError, decoding, views

QUALITY = 92
"""Of the JPEGs that are kept. Colours are at half the resolution, as in most photographs."""
_LONGEST = 65_000
"""JPEG holds at most 65,500 pixels a side."""
_FORM = 1
"""Version of what is kept. Files of other versions are not read."""


@dataclass(frozen=True)
class Shrunk:
    """The form in which samples are kept."""

    side: int
    """Shorter side in pixels to which larger images are shrunk."""
    limits: SampleLimits
    max_pixels: int
    """Images with more pixels stay as they are: rendering refuses them."""


@dataclass(frozen=True)
class ResizedSamples:
    """Samples whose images are shrunk before they are rendered, and the cache that keeps them.

    A sample is rendered from its shrunk image in every epoch, also in the first and where nothing could be kept, so
    that a batch does not depend on the content of the cache.
    """

    cache: DiskCache
    form: Shrunk

    def has(self, shard: ShardIndex, start: int, stop: int) -> bool:
        """True if the sample in these bytes of a shard is kept."""
        return self.cache.has(self._name(shard, start, stop))

    def get(self, shard: ShardIndex, start: int, stop: int) -> bytes | None:
        """The tar members of the sample in these bytes of a shard, its images shrunk; None if it is not kept."""
        return self.cache.get(self._name(shard, start, stop))

    def keep(self, shard: ShardIndex, start: int, stop: int, original: bytes) -> bytes:
        """Shrink the images of a sample's tar members, and keep the result.

        Returns: the result, or the original if it cannot be used.
        """
        shrunk = shrink(original, self.form)
        if shrunk is None:
            return original
        if shrunk != original or is_remote(shard.shard):  # a local shard has the same bytes
            self.cache.put(self._name(shard, start, stop), shrunk)
        return shrunk

    def _name(self, shard: ShardIndex, start: int, stop: int) -> Name:
        # Of a local shard the time changes with its content, of a remote one the checksum of the index.
        source = shard.shard, shard.bytes, shard.mtime_ns, shard.checksum, start, stop
        return (*source, self.form.side, self.form.max_pixels, repr(self.form.limits), QUALITY, _FORM)


def shrink(content: bytes, form: Shrunk) -> bytes | None:
    """The tar members of a sample, with larger images as JPEGs of the shorter side `form.side`.

    Other members, and images that are small enough, are copied byte by byte. Names stay, as formats are recognised by
    their first bytes.

    Returns: None if the sample or one of its images cannot be used.
    """
    archive = Archive(lambda offset, count: content[offset : offset + count], len(content))
    try:
        group = next(groups(archive, form.limits, need_text=False), None)
        if group is None or group.defect is not None:
            return None
        images = {member.start for member in group.images()}
        parts = []
        for member in archive.members():
            image = content[member.data : member.data + member.size] if member.start in images else None
            small = None if image is None else _shrink_image(image, form)
            parts.append(content[member.start : member.end] if small is None else _tar_member(member.name, small))
        return b"".join(parts)
    except (TarError, DecodeError):
        return None


def _shrink_image(image: bytes, form: Shrunk) -> bytes | None:
    """The image as a JPEG of the shorter side `form.side`; None if it is not larger.

    Raises:
        DecodeError: it cannot be decoded, or is too long for a JPEG.
    """
    header = decoding.read_header(image, form.max_pixels)
    if min(header.width, header.height) <= form.side:
        return None
    pixels = views.shrink(image, header, form.side)
    if max(pixels.shape) > _LONGEST:
        raise DecodeError("the image is too long for a JPEG")
    return bytes(simplejpeg.encode_jpeg(pixels, QUALITY, colorspace="RGB", colorsubsampling="420"))


def _tar_member(name: str, content: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    header = info.tobuf(tarfile.GNU_FORMAT, "utf-8", "backslashreplace")
    return header + content.ljust(padded(len(content)), b"\0")
