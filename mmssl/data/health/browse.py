"""Samples to look at: a sheet of images with their captions, or one sample by its key."""

import json
import textwrap
from collections.abc import Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mmssl.data.shards.index import index_shards
from mmssl.data.shards.samples import SampleError, SampleLimits, parse_sample
from mmssl.data.shards.urls import is_remote
from mmssl.data.sources.catalog import Catalog
from mmssl.data.storage.fetch import RetryPolicy
from mmssl.data.storage.files import LocalFiles
from mmssl.data.storage.sequential import iter_samples
from mmssl.data.transforms import DecodeError, Pixels, captions, decoding
from mmssl.errors import UserError
from mmssl.rng import generator
from mmssl.types import Sample

_LINES = 3
_FONT_SIZE = 12
_MARGIN = 8


@dataclass(frozen=True)
class Entry:
    """One image of a sheet; None where it cannot be decoded."""

    pixels: Pixels | None
    """uint8 [H, W, 3]."""
    caption: str


def pick(shards: Sequence[str], count: int, seed: int = 0, limits: SampleLimits | None = None) -> list[Sample]:
    """`count` samples drawn evenly from all of the shards, in file order.

    Local shards are read where the samples stand, by their index; remote ones from beginning to end.
    """
    rng, limits = generator(seed, "pick"), limits or SampleLimits()
    if any(is_remote(shard) for shard in shards):
        return _reservoir(iter_samples(shards, limits), count, rng)
    indexes = index_shards(shards, limits)
    total = sum(index.samples for index in indexes)
    numbers = np.sort(rng.choice(total, min(count, total), replace=False))
    chosen = []
    with closing(LocalFiles()) as files:
        for place in Catalog([indexes], RetryPolicy()).locations(0, numbers):
            shard = shards[place.shard]
            with suppress(SampleError):
                chosen.append(parse_sample(place.id, shard, files.read(shard, place.start, place.stop), limits))
    return chosen


def _reservoir(samples: Iterable[Sample], count: int, rng: np.random.Generator) -> list[Sample]:
    """One pass, with no more than `count` samples in memory."""
    chosen: list[Sample] = []
    for number, sample in enumerate(samples):
        if number < count:
            chosen.append(sample)
        elif (place := int(rng.integers(number + 1))) < count:
            chosen[place] = sample
    return sorted(chosen, key=lambda sample: sample.id)


def find(shards: Sequence[str], key: str, limits: SampleLimits | None = None) -> Sample:
    """The first sample with a key, given as it stands in the tar or as `shard:key`.

    Raises:
        UserError: no sample has it.
    """
    for sample in iter_samples(shards, limits):
        if key in (sample.key, f"{sample.shard}:{sample.key}"):
            return sample
    raise UserError(f"no sample {key!r} in {len(shards)} shards; keys look like {_first_key(shards, limits)!r}")


def describe(sample: Sample) -> str:
    """All that is known of a sample, as text."""
    try:
        header = decoding.read_header(sample.image)
        image = f"{header.format}, {header.width} x {header.height} pixels, {len(sample.image):,} bytes"
        if header.orientation != 1:
            image += f", EXIF orientation {header.orientation}"
    except DecodeError as error:
        image = str(error)
    lines = [f"{sample.shard}:{sample.key}", f"  image: {image}"]
    lines += [f"  {name}: {json.dumps(value, ensure_ascii=False)}" for name, value in sample.fields.items()]
    return "\n".join(lines)


def entries(samples: Iterable[Sample], templates: Sequence[str] = ("{txt}",)) -> list[Entry]:
    """Samples with the first template's caption; what cannot be used shows its error instead."""
    shown = []
    for sample in samples:
        try:
            caption = captions.render_caption(sample.fields, templates, None)
            shown.append(Entry(decoding.decode(sample.image), caption))
        except (DecodeError, UserError) as error:
            shown.append(Entry(None, f"{sample.key}: {error}"))
    return shown


def contact_sheet(entries: Sequence[Entry], columns: int = 8, side: int = 160) -> Image.Image:
    """Images fitted into squares of `side` pixels, a few lines of caption under each."""
    font = ImageFont.load_default(_FONT_SIZE)
    rows = max(1, -(-len(entries) // columns))
    width, height = side + _MARGIN, side + _MARGIN + _LINES * (_FONT_SIZE + 3)
    sheet = Image.new("RGB", (columns * width + _MARGIN, rows * height + _MARGIN), "white")
    canvas = ImageDraw.Draw(sheet)
    for number, entry in enumerate(entries):
        left, top = _MARGIN + number % columns * width, _MARGIN + number // columns * height
        if entry.pixels is None:
            canvas.rectangle((left, top, left + side - 1, top + side - 1), outline="red")
        else:
            image = _fit(entry.pixels, side)
            sheet.paste(image, (left + (side - image.width) // 2, top + (side - image.height) // 2))
        lines = textwrap.wrap(entry.caption, width=side // 6, max_lines=_LINES, placeholder=" ...")
        canvas.multiline_text((left, top + side + 2), "\n".join(lines), fill="black", font=font, spacing=2)
    return sheet


def _fit(pixels: Pixels, side: int) -> Image.Image:
    image = Image.fromarray(np.ascontiguousarray(pixels))
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BICUBIC)


def _first_key(shards: Sequence[str], limits: SampleLimits | None) -> str:
    return next((sample.key for sample in iter_samples(shards, limits)), "nothing: there is no usable sample")
