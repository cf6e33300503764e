"""Shards for tests, written with Python's tarfile, and a rendering that needs no image."""

import hashlib
import io
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from mmssl.data import LoaderConfig, Source, TrainLoader
from mmssl.data.loading import Render
from mmssl.data.transforms.render import Rendered
from mmssl.types import Sample

File = tuple[str, bytes]


def tar_bytes(files: Iterable[File | tarfile.TarInfo], fmt: int = tarfile.USTAR_FORMAT) -> bytes:
    """An archive of regular files, and of links and the like, which a TarInfo describes in full."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=fmt) as tar:
        for file in files:
            if isinstance(file, tarfile.TarInfo):
                tar.addfile(file)
                continue
            info = tarfile.TarInfo(file[0])
            info.size = len(file[1])
            tar.addfile(info, io.BytesIO(file[1]))
    return out.getvalue()


def pair(key: str, size: int = 40) -> list[File]:
    """The files of an image and a caption. The image is the key, padded to `size` bytes."""
    return [(f"{key}.jpg", key.encode().ljust(size, b".")), (f"{key}.txt", f"caption of {key}".encode())]


def write_shards(folder: Path, counts: Sequence[int], size: int = 40) -> list[str]:
    """Shards of `counts` pairs whose keys are unique over all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for shard, count in enumerate(counts):
        path = folder / f"{shard:05d}.tar"
        path.write_bytes(tar_bytes(f for i in range(count) for f in pair(f"{shard}-{i}", size + i % 7)))
        paths.append(str(path))
    return paths


def toy_render(samples: Sequence[Sample], epoch: int) -> Rendered:
    """A 2 x 2 image of each image's hash and the epoch; images that begin with `broken` are bad."""
    digests = [hashlib.blake2b(s.image + bytes([epoch]), digest_size=12).digest() for s in samples]
    pixels = torch.tensor([list(digest) for digest in digests], dtype=torch.uint8).view(-1, 3, 2, 2)
    bad = [(row, "it is broken") for row, s in enumerate(samples) if s.image.startswith(b"broken")]
    return Rendered({"main": pixels}, [str(s.fields.get("txt", "")) for s in samples], bad, {})


def toy_tokenize(texts: list[str]) -> tuple[Tensor, Tensor]:
    """Character codes, padded with zeros."""
    width = max(len(text) for text in texts)
    tokens = torch.tensor([[ord(c) for c in text.ljust(width, "\0")] for text in texts])
    return tokens, tokens != 0


def toy_loader(sources: Sequence[Source], render: Render = toy_render, **options: Any) -> TrainLoader:
    """A stream with seed 0 and batches of 8, if `options` of the `LoaderConfig` do not differ."""
    return TrainLoader(sources, LoaderConfig(**{"seed": 0, "batch_size": 8, **options}), render, toy_tokenize)


def toy_stream(shards: Sequence[str], **options: Any) -> TrainLoader:
    """A stream over one source, with 4 lanes and blocks of three slices of 4 KiB."""
    settings = {"lanes": 4, "shuffle_block": 3, "slice_mib": 4096 / 2**20, **options}
    with patch("mmssl.data.order.epoch.SHUFFLE_UNIT", 4096):
        return toy_loader([Source(shards)], **settings)
