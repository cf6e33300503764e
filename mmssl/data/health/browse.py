"""Single samples: a contact sheet of images with captions, or one sample by its key."""

import json
from collections.abc import Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mmssl.data.shards import SampleLimits, index_shards, is_remote
from mmssl.data.shards.samples import SampleError, parse_sample
from mmssl.data.sources.catalog import Catalog
from mmssl.data.storage import LocalFiles, RetryPolicy, iter_samples
from mmssl.data.transforms import DecodeError, Pixels, captions, decoding
from mmssl.errors import UserError
from mmssl.plotting import font_for, wrapped
from mmssl.rng import generator
from mmssl.types import Sample

_CAPTION_LINES = 3
_FONT_SIZE = 12
_MARGIN = 8


@dataclass(frozen=True)
class SheetEntry:
    """One image of a contact sheet."""

    pixels: Pixels | None
    """uint8 [H, W, 3]; None if the image cannot be decoded."""
    caption: str


def pick(shards: Sequence[str], count: int, seed: int = 0, limits: SampleLimits | None = None) -> list[Sample]:
    """Draw `count` samples uniformly from all shards, in file order.

    Local shards are read at random positions by their index, remote ones sequentially.
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
    """Draw `count` samples in one pass, with at most `count` in memory."""
    chosen: list[Sample] = []
    for number, sample in enumerate(samples):
        if number < count:
            chosen.append(sample)
        elif (place := int(rng.integers(number + 1))) < count:
            chosen[place] = sample
    return sorted(chosen, key=lambda sample: sample.id)


def find(shards: Sequence[str], key: str, limits: SampleLimits | None = None) -> Sample:
    """Find the first sample with a key, given as in the tar or as `shard:key`.

    Raises:
        UserError: no sample has this key.
    """
    for sample in iter_samples(shards, limits):
        if key in (sample.key, f"{sample.shard}:{sample.key}"):
            return sample
    more = f" and {len(shards) - 1} more" if len(shards) > 1 else ""
    raise UserError(f"no sample {key!r} in {shards[0]}{more}; keys look like {_example_key(shards, limits)!r}")


def describe(sample: Sample) -> str:
    """Key, image format and fields of a sample as text."""
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


def entries(samples: Iterable[Sample], templates: Sequence[str] = ("{txt}",)) -> list[SheetEntry]:
    """Entries of a contact sheet with the first template's captions; unusable samples show their error."""
    shown = []
    for sample in samples:
        try:
            caption = captions.render_caption(sample.fields, templates, None)
            shown.append(SheetEntry(decoding.decode(sample.image), caption))
        except (DecodeError, UserError) as error:
            shown.append(SheetEntry(None, f"{sample.key}: {error}"))
    return shown


def contact_sheet(entries: Sequence[SheetEntry], columns: int = 8, side: int = 160) -> Image.Image:
    """Draw images fitted into squares of `side` pixels, each with a few lines of its caption below."""
    rows = max(1, -(-len(entries) // columns))
    width, height = side + _MARGIN, side + _MARGIN + _CAPTION_LINES * (_FONT_SIZE + 3)
    sheet = Image.new("RGB", (columns * width + _MARGIN, rows * height + _MARGIN), "white")
    canvas = ImageDraw.Draw(sheet)
    for number, entry in enumerate(entries):
        left, top = _MARGIN + number % columns * width, _MARGIN + number // columns * height
        if entry.pixels is None:
            canvas.rectangle((left, top, left + side - 1, top + side - 1), outline="red")
        else:
            image = _fit_into(entry.pixels, side)
            sheet.paste(image, (left + (side - image.width) // 2, top + (side - image.height) // 2))
        caption = wrapped(entry.caption, side // 6, _CAPTION_LINES)
        font = ImageFont.truetype(font_for(entry.caption), _FONT_SIZE)
        canvas.multiline_text((left, top + side + 2), caption, fill="black", font=font, spacing=2)
    return sheet


def _fit_into(pixels: Pixels, side: int) -> Image.Image:
    image = Image.fromarray(np.ascontiguousarray(pixels))
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BICUBIC)


def _example_key(shards: Sequence[str], limits: SampleLimits | None) -> str:
    return next((sample.key for sample in iter_samples(shards, limits)), "nothing: no sample is usable")
