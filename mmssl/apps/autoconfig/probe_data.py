"""A look at shards: how many pairs, how long their captions, how large their images."""

import math
from collections.abc import Sequence
from itertools import islice
from statistics import median

from mmssl.apps.autoconfig.inputs import Pairs
from mmssl.data import iter_samples
from mmssl.data.transforms import DecodeError, captions, decoding
from mmssl.errors import UserError

SHARDS, SAMPLES = 8, 128
"""So many samples of so many shards are looked at."""
PIECES_A_WORD = 1.4
"""Tokens of an English word, about."""
_IDEOGRAPHS = "\u2e80"
"""From here on scripts are written without spaces, and tokenizers make a token of each character."""


def look_at(shards: Sequence[str], count: int, templates: Sequence[str] = ("{txt}",)) -> Pairs:
    """What is known of pairs from some of them, evenly spread over the shards.

    Args:
        count: their number, which the shards' index knows.

    Raises:
        UserError: a shard cannot be read, no sample is usable, or a template names a field that they lack.
    """
    step = max(1, len(shards) // SHARDS)
    lengths, sides = [], []
    for shard in shards[::step][:SHARDS]:
        for sample in islice(iter_samples([shard], on_bad=lambda bad: None), SAMPLES):
            try:
                header = decoding.read_header(sample.image)
            except DecodeError:
                continue
            sides.append(min(header.width, header.height))
            rendered = (captions.render_caption(sample.fields, [template], None) for template in templates)
            lengths.append(max(count_tokens(captions.clean_caption(caption)) for caption in rendered))
    if not sides:
        raise UserError(f"no usable pair in {shards[0]}; for a whole report: mmssl shards check PATTERN")
    return Pairs(count, sorted(lengths)[math.ceil(0.95 * len(lengths)) - 1], round(median(sides)))


def count_tokens(caption: str) -> int:
    """An estimate of a caption's tokens before there is a tokenizer."""
    alone = sum(character >= _IDEOGRAPHS for character in caption)
    words = "".join(" " if character >= _IDEOGRAPHS else character for character in caption).split()
    return alone + math.ceil(PIECES_A_WORD * len(words))
