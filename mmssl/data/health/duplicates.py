"""Duplicate and near-duplicate images and captions."""

import hashlib
import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from mmssl.data.transforms import Pixels, decoding

Ints = npt.NDArray[np.int64]

THUMBNAIL = 12
"""Side of the compared thumbnails, in pixels."""
_DECODED_SIDE = 48
"""Smallest side in pixels after a reduced decode: enough for a thumbnail."""
_EQUAL_DIFFERENCE = 2
"""Neighbouring blocks that differ by at most this (0 to 255) count as equal."""
_WINDOW = 16
_ROTATIONS = 4
_MEAN_DIFFERENCE = 2.5
_MAX_DIFFERENCE = 32
_RELATIVE_DIFFERENCE = 0.06
_MAX_SIGN_CHANGES = 10
"""Near duplicates differ in at most this many signs, of 60."""
_CHUNK = 1 << 16
_FEW = 1 << 10
"""Images that are compared at a time with one of which a copy is sought."""
_ONE, _TWO, _FOUR, _TOP = (np.uint64(shift) for shift in (1, 2, 4, 56))
_PAIRS, _FOURS, _EIGHTS, _SUM = (np.uint64(byte * 0x0101010101010101) for byte in (0x55, 0x33, 0x0F, 0x01))
_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True)
class Fingerprint:
    """What is compared of an image."""

    digest: bytes
    """BLAKE2b-128 of the encoded image."""
    thumbnail: Pixels
    """uint8 [12, 12, 3]."""


class KnownImages:
    """Images by their keys, to find copies of them."""

    def __init__(self, keys: Sequence[str], images: Sequence[Fingerprint]) -> None:
        self._keys = keys
        self._digests = {image.digest: key for key, image in zip(keys, images, strict=True)}
        thumbnails = np.array([image.thumbnail for image in images], np.uint8).reshape(-1, THUMBNAIL, THUMBNAIL, 3)
        self._flat = thumbnails.reshape(len(thumbnails), 3 * THUMBNAIL**2)
        self._signs, self._variation = _signs(thumbnails), _variation(thumbnails)

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, image: bytes) -> str | None:
        """Key of a known image of which an encoded image is a copy or a near copy.

        Raises:
            DecodeError: it cannot be decoded.
        """
        return self.copy_of(fingerprint(image, decoding.read_header(image)))

    def is_exact(self, image: Fingerprint) -> bool:
        """Whether an image has the same bytes as a known one."""
        return image.digest in self._digests

    def copy_of(self, image: Fingerprint) -> str | None:
        """Key of a known image of which this is a copy or a near copy (`near_duplicates`)."""
        if (key := self._digests.get(image.digest)) is not None:
            return key
        one = image.thumbnail[None]
        close = np.flatnonzero(_distance(self._signs, _signs(one)) <= _MAX_SIGN_CHANGES)
        for start in range(0, len(close), _FEW):  # among many images of one colour, the first are near already
            part = close[start : start + _FEW]
            flat = np.concatenate([one.reshape(1, -1), self._flat[part]])
            variation = np.concatenate([_variation(one), self._variation[part]])
            pairs = np.stack([np.zeros(len(part), np.int64), np.arange(1, len(flat))], axis=1)
            near = part[_near(flat, variation, pairs)]
            if len(near):
                return self._keys[int(near[0])]
        return None


def fingerprint(image: bytes, header: decoding.Header) -> Fingerprint:
    """The fingerprint of an encoded image.

    Raises:
        DecodeError: it cannot be decoded.
    """
    side = min(header.width, header.height)
    reduce = next((r for r in decoding.REDUCTIONS if side >= r * _DECODED_SIDE), 1)
    small = thumbnail(decoding.decode(image, header, reduce))
    return Fingerprint(hashlib.blake2b(image, digest_size=16).digest(), small)


def thumbnail(pixels: Pixels) -> Pixels:
    """Squash an image to uint8 [12, 12, 3]."""
    planes = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
    small = F.interpolate(planes, size=(THUMBNAIL, THUMBNAIL), mode="bilinear", antialias=True)[0]
    thumb: Pixels = small.permute(1, 2, 0).contiguous().numpy()
    return thumb


def near_duplicates(thumbnails: Pixels) -> Ints:
    """Pairs [P, 2] of near-duplicate images, found by their thumbnails [N, 12, 12, 3].

    On average the thumbnails differ by at most 2.5 (of 255) and 6 % of their own variation, and nowhere by more than
    32: the same image at another size or compression, or lightly retouched. The signs of the differences between
    neighbouring blocks are sorted in four rotations, and each image is compared with the 16 after it. This is fast for
    millions of images, but may miss a few pairs.
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
            close = _distance(signs[one], signs[other]) <= _MAX_SIGN_CHANGES
            candidates = np.sort(np.stack([one[close], other[close]], axis=1), axis=1)
            pairs += [
                candidates[start : start + _CHUNK][_near(flat, variation, candidates[start : start + _CHUNK])]
                for start in range(0, len(candidates), _CHUNK)
            ]
    return np.unique(np.concatenate(pairs), axis=0)


def equal_pairs(keys: Sequence[Hashable]) -> Ints:
    """Pairs [P, 2] of every repeated item with the first item that has the same key."""
    first: dict[Hashable, int] = {}
    pairs = [(first.setdefault(key, i), i) for i, key in enumerate(keys)]
    return np.array([pair for pair in pairs if pair[0] != pair[1]], dtype=np.int64).reshape(-1, 2)


def sorted_words(caption: str) -> tuple[str, ...]:
    """The words of a caption in alphabetical order, without case and punctuation: equal for near-equal captions."""
    return tuple(sorted(_WORD.findall(caption.casefold()))) or (caption,)


def connect(count: int, *pairs: Ints) -> Ints:
    """Connected components of pairs of items: the smallest item of each item's group, int64 [count]."""
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
    """Signs of the brightness differences between neighbouring blocks of a 6 x 6 grid: 60 bits, packed [N, 8]."""
    half = THUMBNAIL // 2
    luma = thumbnails.reshape(-1, half, 2, half, 2, 3).sum((2, 4), dtype=np.int32) @ np.array([299, 587, 114])
    step = 4 * 1000 * _EQUAL_DIFFERENCE
    right = luma[:, :, 1:] - luma[:, :, :-1] > step
    down = luma[:, 1:, :] - luma[:, :-1, :] > step
    return np.packbits(np.concatenate([a.reshape(len(a), half * (half - 1)) for a in (right, down)], axis=1), axis=1)


def _distance(one: Pixels, other: Pixels) -> npt.NDArray[np.uint64]:
    """Number of signs that differ between packed signs [N, 8] and [N, 8] or [1, 8]: the bits of 64-bit words, counted
    in parallel (Warren, Hacker's Delight, 5-1)."""
    bits = one.view(np.uint64)[:, 0] ^ other.view(np.uint64)[:, 0]
    bits -= bits >> _ONE & _PAIRS
    bits = (bits & _FOURS) + (bits >> _TWO & _FOURS)
    found: npt.NDArray[np.uint64] = ((bits + (bits >> _FOUR) & _EIGHTS) * _SUM) >> _TOP
    return found


def _near(flat: Pixels, variation: npt.NDArray[np.float32], pairs: Ints) -> npt.NDArray[np.bool_]:
    difference = np.abs(flat[pairs[:, 0]].astype(np.int16) - flat[pairs[:, 1]])
    allowed = np.minimum(_MEAN_DIFFERENCE, _RELATIVE_DIFFERENCE * variation[pairs].min(1))
    near: npt.NDArray[np.bool_] = (difference.max(1) <= _MAX_DIFFERENCE) & (difference.mean(1) <= allowed)
    return near


def _variation(thumbnails: Pixels) -> npt.NDArray[np.float32]:
    """Mean absolute difference of the pixels from the image's mean colour (0 to 255), [N]."""
    pixels = thumbnails.reshape(len(thumbnails), THUMBNAIL**2, 3)
    return np.array([np.abs(c - c.mean(0, dtype=np.float32)).mean() for c in pixels], dtype=np.float32)
