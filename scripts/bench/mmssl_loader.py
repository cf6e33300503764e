"""mmssl's side of `python -m scripts.bench data`, and the limit: `python -m scripts.bench.mmssl_loader SETTINGS`.

Prints `ready` after the warm-up and `done` after the measured batches, and waits for a line of input each time, so
that the CPU time in between can be read from outside.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Literal

import psutil
import simplejpeg
import torch
import torch.nn.functional as F

from mmssl.config import ViewConfig
from mmssl.data import LoaderConfig, Source, TrainLoader, iter_samples
from mmssl.data.storage import Access
from mmssl.data.transforms import Renderer, captions, decoding, train_tokenizer, views
from mmssl.data.transforms.augment_params import draw_params
from mmssl.rng import generator

_CAPTIONS = 2_000
"""Captions on which the tokenizer is trained."""
_CACHE_BYTES = 100 << 30


@dataclass(frozen=True)
class LoaderSettings:
    """LoaderSettings of one measuring process."""

    kind: Literal["stream", "normalised", "limit", "epochs"]
    """The stream; the same, normalised on this CPU; decoding and resizing alone; memory over epochs."""
    shards: list[str]
    mode: views.DecodeMode
    image_size: int
    batch_size: int
    workers: int
    warm_up: int
    """Batches before the measurement; epochs are not measured but watched."""
    batches: int
    """Batches measured; number of epochs with `epochs`."""
    cache: str | None = None
    """Folder that keeps resized images."""
    resize: int | None = None
    """Their shorter side in pixels."""

    def json(self) -> str:
        """The settings as JSON, an argument of the process."""
        return json.dumps(asdict(self))


def main() -> None:
    """Run one measurement."""
    settings = LoaderSettings(**json.loads(sys.argv[1]))
    torch.set_num_threads(1)
    if settings.kind == "limit":
        _in_two_parts(settings, _bare_batches(settings).__next__)
        return
    with _stream(settings) as stream:
        if settings.kind == "epochs":
            print(json.dumps(_memory(stream, settings.batches)))
        elif settings.kind == "normalised":
            _in_two_parts(settings, lambda: _normalise(next(stream).views["main"]))
        else:
            _in_two_parts(settings, stream.__next__)


def _in_two_parts(settings: LoaderSettings, work: Callable[[], object]) -> None:
    for word, count in (("ready", settings.warm_up), ("done", settings.batches)):
        for _ in range(count):
            work()
        print(word, flush=True)
        sys.stdin.readline()


def _stream(settings: LoaderSettings) -> TrainLoader:
    """The training loader with OpenCLIP's augmentations, which are our defaults."""
    texts = [
        captions.render_caption(s.fields, ["{txt}"], None) for s in islice(iter_samples(settings.shards), _CAPTIONS)
    ]
    view = views.View(ViewConfig(), settings.image_size, settings.mode)
    kept = settings.cache
    access = Access() if kept is None else Access.keeping(Path(kept), _CACHE_BYTES, settings.resize)
    return TrainLoader(
        [Source(settings.shards)],
        LoaderConfig(seed=0, batch_size=settings.batch_size, workers=settings.workers, access=access),
        Renderer({"main": view}, ["{txt}"], seed=0),
        train_tokenizer(texts, vocab_size=8192, max_tokens=77).encode,
    )


def _normalise(images: torch.Tensor) -> torch.Tensor:
    """Normalisation, as the vision tower does it on the device: uint8 to float32, less the mean, by the deviation."""
    mean, deviation = torch.full((1, 3, 1, 1), 118.0), torch.full((1, 3, 1, 1), 68.0)
    return images.float().sub_(mean).div_(deviation)


def _bare_batches(settings: LoaderSettings) -> Iterator[None]:
    """Decoding, cropping and resizing alone, with the same libraries, on samples in memory."""
    count = settings.batch_size * settings.batches
    planned = [_planned(image, number, settings) for number, image in enumerate(_images(settings.shards, count))]
    endless = cycle(planned)
    while True:
        for image, height, width, reduce, top, left, bottom, right in islice(endless, settings.batch_size):
            pixels = simplejpeg.decode_jpeg(image, min_height=height, min_width=width, min_factor=reduce)
            planes = torch.from_numpy(pixels[top:bottom, left:right]).permute(2, 0, 1)[None]
            F.interpolate(planes, size=(settings.image_size,) * 2, mode="bicubic", antialias=True)
        yield


def _images(shards: Sequence[str], count: int) -> Iterator[bytes]:
    return (sample.image for sample in islice(iter_samples(shards), count))


def _planned(image: bytes, number: int, settings: LoaderSettings) -> tuple[bytes, int, int, int, int, int, int, int]:
    """An image, its decoded size, the reduction factor and the crop."""
    view, header = views.View(ViewConfig(), settings.image_size, settings.mode), decoding.read_header(image)
    crop = view.crop(header, draw_params(generator(0, "limit", number)))
    reduce = view.reduction(header, crop)
    height, width = -(-header.height // reduce), -(-header.width // reduce)
    top, left, rows, columns = (length // reduce for length in crop.on_grid(reduce, header))
    return image, height, width, reduce, top, left, top + rows, left + columns


def _memory(stream: TrainLoader, epochs: int) -> list[int]:
    """Bytes that this process holds after each epoch."""
    held = []
    for _ in range(epochs):
        for _ in range(stream.batches_per_epoch):
            next(stream)
        held.append(int(psutil.Process().memory_info().rss))
    return held


if __name__ == "__main__":
    main()
