"""The images of found rows: read from their shards, and drawn."""

import os
import textwrap
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from mmssl.apps.search.index import Hit, Index
from mmssl.data import USUAL_MEMBERS, MemberNames, iter_samples
from mmssl.data.shards import SampleLimits, image_ranges, is_remote
from mmssl.data.transforms import DecodeError, decoding
from mmssl.errors import UserError
from mmssl.files import open_regular
from mmssl.plotting import drawing, wrapped

REMOTE = ("http", "https", "s3", "gs", "gcs", "az", "abfs", "abfss", "hf")
"""Schemes of addresses that an index may name."""
CACHED_SHARDS = 32
"""Shards whose tables of contents stay in memory."""
_COLUMNS = 5
_INCHES = 2.4


class ShardImages:
    """Encoded images by row. The first image of a shard costs a pass over its headers, the others one read."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._ranges = lru_cache(CACHED_SHARDS)(image_ranges)

    def read(self, row: int) -> bytes | None:
        """The encoded image of a row; None if its shard is remote or missing, or no longer has the image."""
        hit = self._index.hits([row], [0.0])[0]
        if is_remote(hit.shard):
            return None
        try:
            with open_regular(hit.shard) as file:
                status = os.fstat(file.fileno())
                found = self._ranges(hit.shard, status.st_mtime_ns, status.st_size, self._index.members).get(hit.key)
                if found is None:
                    return None
                start, size = found
                content = os.pread(file.fileno(), size, start)
        except OSError:
            return None
        return content if len(content) == size else None


def read_images(hits: Sequence[Hit], members: MemberNames = USUAL_MEMBERS, remote: bool = False) -> list[bytes | None]:
    """The encoded image of each hit, read from its shard; None where it is missing.

    Args:
        members: names of the images inside the shards.
        remote: read remote shards too. Only for names that the user gave: an index from elsewhere can name any address.

    Raises:
        UserError: a shard cannot be read, or its address is of another kind than REMOTE.
    """
    wanted: dict[str, set[str]] = {}
    for hit in hits:
        wanted.setdefault(hit.shard, set()).add(hit.key)
    found: dict[tuple[str, str], bytes] = {}
    for shard, keys in wanted.items():
        if is_remote(shard):
            if not remote:
                continue
            _check_address(shard)
        for sample in iter_samples([shard], SampleLimits(members=members), need_text=False, on_bad=lambda bad: None):
            for row in sample.each_image():
                if row.key in keys:
                    found[shard, row.key] = row.image
                    keys.discard(row.key)
            if not keys:
                break
    return [found.get((hit.shard, hit.key)) for hit in hits]


def _check_address(shard: str) -> None:
    scheme = shard.partition("://")[0]
    if scheme not in REMOTE:
        raise UserError(f"the index names the shard {shard}; of addresses, only {', '.join(REMOTE)} are read")


def draw_hits(path: Path, query: str, hits: Sequence[Hit], images: Sequence[bytes | None]) -> None:
    """Write a PNG with the images, their similarities and captions in rows, the nearest first.

    Raises:
        UserError: the file cannot be written.
    """
    columns = min(_COLUMNS, max(1, len(hits)))
    rows = -(-len(hits) // columns)
    size = (columns * _INCHES, rows * (_INCHES + 0.6) + 0.4)
    with drawing(path, *size, dpi=100, font_size=8, format="png") as canvas:
        canvas.suptitle(wrapped(query, int(11 * size[0]), 2), fontsize=11, parse_math=False)
        for place, (hit, image) in enumerate(zip(hits, images, strict=True)):
            axes = canvas.add_subplot(rows, columns, place + 1)
            axes.set_axis_off()
            axes.set_anchor("N")  # aligns the tops of the images in a row, where their titles end
            if image is not None:
                try:
                    axes.imshow(decoding.decode(image))
                except DecodeError as error:
                    reason = textwrap.fill(str(error), 24)
                    axes.text(0.5, 0.5, reason, ha="center", va="center", parse_math=False)
            words = textwrap.shorten(hit.caption or hit.key, 64)
            axes.set_title(f"{hit.similarity:.3f}\n{textwrap.fill(words, 32)}", parse_math=False)
