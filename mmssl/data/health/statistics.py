"""Statistics of a surveyed dataset by subject. All values are JSON types."""

import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mmssl.data.health.duplicates import Fingerprint, Ints, KnownImages, connect, equal_pairs
from mmssl.data.health.survey import Survey
from mmssl.data.shards.causes import cause_of
from mmssl.data.transforms import Tokenizer

Statistics = dict[str, Any]
"""Name -> number, list, or name -> number."""
Floats = npt.NDArray[np.float64]

TINY = 32
"""Shorter side in pixels below which an image shows too little."""
HUGE = 16_000_000
"""Pixels above which decoding an image costs far more than a model sees of it."""
LONG = 4
"""Aspect ratio above which the centre crop loses most of an image."""
MASK_RATES = (0.15, 0.3, 0.4)
"""Fractions of masked words at which captions without a target are counted."""
_EXAMPLES = 5
_UNKNOWN_READ = 1000
"""Captions with unknown tokens that are searched for examples."""


def sample_statistics(survey: Survey) -> Statistics:
    """Counts of usable samples, and of those left out by reason."""
    per_shard = Counter(survey.shards)
    keys = Counter(key[len(shard) + 1 :] for key, shard in zip(survey.keys, survey.shards, strict=True))
    again = [key for key, count in keys.items() if count > 1]
    return {
        "usable": len(survey),
        "shards": len(per_shard),
        "samples of a shard, fewest to most": [min(per_shard.values()), max(per_shard.values())] if per_shard else [],
        **_several("images", survey.image_counts),
        **_several("captions", survey.caption_counts),
        "left out": dict(Counter(cause_of(bad.error) for bad in survey.bad).most_common()),
        "left out, examples": [f"{bad.shard}:{bad.key} ({bad.error})" for bad in survey.bad[:_EXAMPLES]],
        "damaged shards": survey.problems,
        "keys in several shards": len(again),
        "keys in several shards, examples": again[:_EXAMPLES],
    }


def _several(what: str, counts: Sequence[int]) -> Statistics:
    """Samples with more than one, and their total; nothing where each sample has one."""
    more = [count for count in counts if count > 1]
    return {f"with several {what}": len(more), f"{what} of all samples": sum(counts)} if more else {}


def image_statistics(survey: Survey, image_size: int) -> Statistics:
    """Formats, sizes, and fractions of unsuitable images.

    Images are tiny (shorter side below 32 px), huge (more than 16 megapixels), enlarged to the model's `image_size`,
    shrunk to a quarter of their side or less, or long (aspect ratio above 4).
    """
    if not len(survey):
        return {}
    sides = survey.sides()
    short, pixels = sides.min(1), sides.prod(1)
    return {
        "formats": _shares(Counter(survey.formats)),
        "bytes, mean": round(float(np.mean(survey.image_bytes))),
        "shorter side, quantiles 1 50 99 %": _quantiles(short),
        "tiny": float(np.mean(short < TINY)),
        "huge": float(np.mean(pixels > HUGE)),
        "enlarged": float(np.mean(short < image_size)),
        "shrunk to a quarter or less": float(np.mean(short >= 4 * image_size)),
        "long": float(np.mean(sides.max(1) > LONG * short)),
    }


def image_copy_statistics(survey: Survey, copies: Ints, near: Ints) -> Statistics:
    """Counts of duplicate images, without the first of each group."""
    exact = connect(len(survey), copies)
    both = connect(len(survey), copies, near)
    groups, sizes = np.unique(both, return_counts=True)
    largest = groups[np.argsort(-sizes, kind="stable")][:_EXAMPLES]
    differ = sum(survey.captions[i] != survey.captions[j] for i, j in copies.tolist())
    return {
        "exact copies": _extra(exact),
        "exact copies under another caption": differ,
        "near copies": _extra(both) - _extra(exact),
        "copies, examples": [
            [survey.keys[i] for i in np.flatnonzero(both == group)[:3]]
            for group in largest
            if (both == group).sum() > 1
        ],
    }


def shared_statistics(survey: Survey, known: KnownImages) -> Statistics:
    """Images that are copies of known ones, of other shards."""
    images = [Fingerprint(*image) for image in zip(survey.digests, survey.thumbnails, strict=True)]
    pairs = [[key, found] for key, image in zip(survey.keys, images, strict=True) if (found := known.copy_of(image))]
    exact = sum(map(known.is_exact, images))
    return {
        "images compared with": len(known),
        "exact copies": exact,
        "near copies": len(pairs) - exact,
        "copies, examples": pairs[:_EXAMPLES],
    }


def caption_statistics(survey: Survey, tokenizer: Tokenizer | None) -> Statistics:
    """Lengths, what a tokenizer loses, scripts, and the fraction without a target for masked language modelling."""
    if not len(survey):
        return {"most repeated": {}, "scripts of letters": {}}
    words = np.array([len(caption.split()) for caption in survey.captions])
    if tokenizer is None:
        found: Statistics = {"words, quantiles 1 50 99 %": _quantiles(words)}
    else:
        found = _token_statistics(survey.captions, tokenizer)
    found |= {
        "not plain ASCII": float(np.mean([not caption.isascii() for caption in survey.captions])),
        "scripts of letters": _shares(_scripts(survey.captions)),
    }
    for rate in MASK_RATES:
        # Words are masked independently, as in BERT.
        found[f"no masked word at a rate of {rate:g}"] = float(np.mean((1 - rate) ** words))
    return found


def caption_copy_statistics(survey: Survey, alike: Ints) -> Statistics:
    """Counts of repeated captions, without the first of each group."""
    counts = Counter(survey.captions)
    near = _extra(connect(len(survey), alike))
    exact = len(survey) - len(counts)
    return {
        "exact repetitions": exact,
        "near repetitions (same words)": near - exact,
        "most repeated": {text: count for text, count in counts.most_common(8) if count > 1},
    }


def batch_statistics(count: int, groups: Ints, batch_size: int) -> Statistics:
    """False negatives of a contrastive batch: pairs whose images or captions are copies.

    A uniformly drawn batch of B among N samples, with groups of n_g copies, contains on average
    B (B - 1) / 2 * sum n_g (n_g - 1) / (N (N - 1)) such pairs.
    """
    if count < 2:
        return {}
    sizes = np.unique(groups, return_counts=True)[1].astype(np.float64)
    collide = float((sizes * (sizes - 1)).sum() / (count * (count - 1)))
    chance = (sizes - 1) / (count - 1)
    touched = float((sizes * (1 - (1 - chance) ** (batch_size - 1))).sum() / count)
    return {
        "expected pairs of copies": batch_size * (batch_size - 1) / 2 * collide,
        "samples that meet a copy": touched,
    }


def caption_batch_statistics(survey: Survey, batch_size: int) -> Statistics:
    """The part of these false negatives that have the very same caption, as `positives: caption` finds them."""
    groups = connect(len(survey), equal_pairs(survey.captions))
    found = batch_statistics(len(survey), groups, batch_size)
    return {"samples that meet their caption": found["samples that meet a copy"]} if found else {}


def length_statistics(survey: Survey, tokenizer: Tokenizer | None) -> Floats:
    """Length of each caption in tokens, or in words without a tokenizer."""
    if tokenizer is None:
        return np.array([len(caption.split()) for caption in survey.captions], dtype=np.float64)
    return np.array(tokenizer.measure(survey.captions).lengths, dtype=np.float64)


def _token_statistics(captions: Sequence[str], tokenizer: Tokenizer) -> Statistics:
    """Lengths in tokens, and what is lost: cut captions, unknown tokens, and captions whose difference is lost.

    Captions that differ in case only do not count as different.
    """
    tokens = tokenizer.measure(captions)
    lengths, unknown = np.array(tokens.lengths), np.array(tokens.unknown)
    parts = Counter(
        part for i in np.flatnonzero(unknown)[:_UNKNOWN_READ] for part in tokenizer.unknown_parts(captions[i])
    )
    different = {(row, caption.casefold()) for row, caption in zip(tokens.ids, captions, strict=True)}
    return {
        "tokens, quantiles 1 50 99 %": _quantiles(lengths),
        "cut": float(np.mean(lengths > tokenizer.max_tokens)),
        "unknown tokens": float(unknown.sum() / max(1, sum(map(len, tokens.ids)))),
        "captions with unknown tokens": float(np.mean(unknown > 0)),
        "unknown, examples": [part for part, _ in parts.most_common(_EXAMPLES)],
        "different captions with the same tokens": len(different) - len(set(tokens.ids)),
    }


def _extra(groups: Ints) -> int:
    """Number of items beyond the first of their group."""
    return len(groups) - len(np.unique(groups))


def _shares(counts: Counter[str]) -> dict[str, float]:
    total = counts.total()
    return {name: count / total for name, count in counts.most_common(8)}


def _quantiles(values: npt.NDArray[Any]) -> list[float]:
    return [round(float(q), 1) for q in np.quantile(values, [0.01, 0.5, 0.99])]


def _scripts(captions: Sequence[str]) -> Counter[str]:
    """Number of letters per script (LATIN, CYRILLIC, CJK ...), the first word of a letter's Unicode name."""
    characters, scripts = Counter[str](), Counter[str]()
    for caption in captions:
        characters.update(caption)
    for letter, count in characters.items():
        if letter.isalpha():
            scripts[unicodedata.name(letter, "UNNAMED").split()[0]] += count
    return scripts
