"""Which pictures and captions are copies of each other."""

import re
from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from mmssl.data.decode import Pixels

Ints = npt.NDArray[np.int64]

THUMBNAIL = 8
"""Side of the thumbnails that are compared, in pixels."""
_STEP = 2
"""Neighbouring cells that differ by no more, of 255, count as equal."""
_WINDOW = 16
_ROTATIONS = 4
_MEAN_DIFFERENCE = 2.5
_MAX_DIFFERENCE = 16
_CHUNK = 1 << 16
_WORD = re.compile(r"[^\W_]+")


def thumbnail(pixels: Pixels) -> Pixels:
    """A picture as uint8 [8, 8, 3]: the mean colour of each cell."""
    planes = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None].float()
    cells = F.interpolate(planes, size=(THUMBNAIL, THUMBNAIL), mode="area")[0]
    thumb: Pixels = cells.permute(1, 2, 0).round().to(torch.uint8).numpy()
    return thumb


def near_pictures(thumbnails: Pixels) -> Ints:
    """Pairs of pictures [P, 2] whose thumbnails [N, 8, 8, 3] hardly differ: by 2.5 of 255 on average, by 16 at most.

    Such pictures are the same but for size, compression or light touches. The signs of the differences between
    neighbouring cells are sorted in a few rotations, and each picture is compared with the 16 after it: fast for
    millions, and copies by the dozen end in one group, but a pair here or there may be missed.
    """
    count = len(thumbnails)
    flat = thumbnails.reshape(count, -1)
    signs = _signs(thumbnails)
    pairs = []
    for rotation in range(_ROTATIONS):
        turned = np.roll(signs, -rotation * signs.shape[1] // _ROTATIONS, axis=1)
        order = np.lexsort(turned.T[::-1])
        for gap in range(1, min(_WINDOW, count - 1) + 1):
            for start in range(0, count - gap, _CHUNK):
                first = order[start : min(start + _CHUNK, count - gap)]
                second = order[start + gap : start + gap + len(first)]
                near = _alike(flat[first], flat[second])
                pairs.append(np.sort(np.stack([first[near], second[near]], axis=1), axis=1))
    return np.unique(np.concatenate(pairs), axis=0) if pairs else np.zeros((0, 2), np.int64)


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
    """Which of two neighbouring cells is brighter, as packed bits [N, 14]."""
    luma = thumbnails.astype(np.int32) @ np.array([299, 587, 114])
    step = 1000 * _STEP
    right = luma[:, :, 1:] - luma[:, :, :-1] > step
    down = luma[:, 1:, :] - luma[:, :-1, :] > step
    return np.packbits(np.concatenate([a.reshape(len(a), -1) for a in (right, down)], axis=1), axis=1)


def _alike(one: Pixels, other: Pixels) -> npt.NDArray[np.bool_]:
    difference = np.abs(one.astype(np.int16) - other)
    near: npt.NDArray[np.bool_] = (difference.max(1) <= _MAX_DIFFERENCE) & (difference.mean(1) <= _MEAN_DIFFERENCE)
    return near
