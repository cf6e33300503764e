"""Which images and captions are copies of each other."""

import re
from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from mmssl.data.transforms import Pixels

Ints = npt.NDArray[np.int64]

THUMBNAIL = 12
"""Side of the thumbnails that are compared, in pixels."""
_STEP = 2
"""Neighbouring cells that differ by no more, of 255, count as equal."""
_WINDOW = 16
_ROTATIONS = 4
_MEAN_DIFFERENCE = 2.5
_MAX_DIFFERENCE = 32
_RELATIVE_DIFFERENCE = 0.06
_SIGNS = 10
"""Near images differ in the sign of at most so many of 60 pairs of neighbouring cells."""
_CHUNK = 1 << 16
_BITS = np.array([number.bit_count() for number in range(256)], dtype=np.uint8)
_WORD = re.compile(r"[^\W_]+")


def thumbnail(pixels: Pixels) -> Pixels:
    """An image squashed to uint8 [12, 12, 3]."""
    planes = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
    cells = F.interpolate(planes, size=(THUMBNAIL, THUMBNAIL), mode="bilinear", antialias=True)[0]
    thumb: Pixels = cells.permute(1, 2, 0).contiguous().numpy()
    return thumb


def near_duplicates(thumbnails: Pixels) -> Ints:
    """Pairs of images [P, 2] whose thumbnails [N, 12, 12, 3] hardly differ.

    They differ by at most 2.5 of 255 and by 6 % of their own variation on average, and nowhere by more than 32: the
    same image in another size or compression, or lightly retouched. The signs of the differences between
    neighbouring cells are sorted in a few rotations, and each image is compared with the 16 after it: fast for
    millions, but a pair here or there may be missed.
    """
    pairs = [np.zeros((0, 2), np.int64)]
    if len(thumbnails) < 2:
        return pairs[0]
    flat = thumbnails.reshape(len(thumbnails), -1)
    signs, variation = _signs(thumbnails), _variation(thumbnails)
    for rotation in range(_ROTATIONS):
        turned = np.ascontiguousarray(np.roll(signs, rotation * signs.shape[1] // _ROTATIONS, axis=1))
        order = np.argsort(turned.view(">u8")[:, 0], kind="stable")
        for gap in range(1, _WINDOW + 1):
            one, other = order[:-gap], order[gap:]
            close = _BITS[signs[one] ^ signs[other]].sum(1) <= _SIGNS
            candidates = np.sort(np.stack([one[close], other[close]], axis=1), axis=1)
            pairs += [
                candidates[start : start + _CHUNK][_near(flat, variation, candidates[start : start + _CHUNK])]
                for start in range(0, len(candidates), _CHUNK)
            ]
    return np.unique(np.concatenate(pairs), axis=0)


def same(keys: Sequence[Hashable]) -> Ints:
    """Pairs [P, 2] that tie every item to the first one with an equal key."""
    first: dict[Hashable, int] = {}
    pairs = [(first.setdefault(key, i), i) for i, key in enumerate(keys)]
    return np.array([pair for pair in pairs if pair[0] != pair[1]], dtype=np.int64).reshape(-1, 2)


def words_of(caption: str) -> tuple[str, ...]:
    """A caption's words in alphabetical order, without case and punctuation: equal for near-equal captions."""
    return tuple(sorted(_WORD.findall(caption.casefold()))) or (caption,)


def connect(count: int, *pairs: Ints) -> Ints:
    """Group number of each of `count` items, int64 [count]: the smallest item it is tied to, directly or not."""
    parent = list(range(count))

    def root(item: int) -> int:
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    for one, other in np.concatenate([np.zeros((0, 2), np.int64), *pairs]).tolist():
        a, b = root(one), root(other)
        parent[max(a, b)] = min(a, b)
    return np.array([root(item) for item in range(count)], dtype=np.int64)


def _signs(thumbnails: Pixels) -> Pixels:
    """Which of two neighbouring cells of 6 x 6 is brighter: 60 bits, packed [N, 8]."""
    half = THUMBNAIL // 2
    luma = thumbnails.reshape(-1, half, 2, half, 2, 3).sum((2, 4), dtype=np.int32) @ np.array([299, 587, 114])
    step = 4 * 1000 * _STEP
    right = luma[:, :, 1:] - luma[:, :, :-1] > step
    down = luma[:, 1:, :] - luma[:, :-1, :] > step
    return np.packbits(np.concatenate([a.reshape(len(a), -1) for a in (right, down)], axis=1), axis=1)


def _near(flat: Pixels, variation: npt.NDArray[np.float32], pairs: Ints) -> npt.NDArray[np.bool_]:
    difference = np.abs(flat[pairs[:, 0]].astype(np.int16) - flat[pairs[:, 1]])
    allowed = np.minimum(_MEAN_DIFFERENCE, _RELATIVE_DIFFERENCE * variation[pairs].min(1))
    near: npt.NDArray[np.bool_] = (difference.max(1) <= _MAX_DIFFERENCE) & (difference.mean(1) <= allowed)
    return near


def _variation(thumbnails: Pixels) -> npt.NDArray[np.float32]:
    """Mean distance of the cells from the image's mean colour, of 255 [N]."""
    cells = thumbnails.reshape(len(thumbnails), -1, 3)
    return np.array([np.abs(c - c.mean(0, dtype=np.float32)).mean() for c in cells], dtype=np.float32)
