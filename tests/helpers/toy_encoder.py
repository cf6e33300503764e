"""A toy encoder whose answers are known, and shards for it."""

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmssl.rng import generator

Record = Mapping[str, Any]


class ToyEncoder:
    """Sees the number painted into an image and the last number in a text; both become the same vector.

    With `noise` every image's vector is off by a fixed random amount, so that answers are partly wrong.
    """

    def __init__(self, size: int = 64, noise: float = 0.0) -> None:
        self.table = torch.from_numpy(generator(7, "table").normal(size=(4096, size))).float()
        self.noise = noise
        self.calls: list[int] = []

    def encode_image(self, images: Sequence[bytes]) -> Tensor:
        self.calls.append(len(images))
        rows = []
        for image in images:
            pixel = np.asarray(Image.open(io.BytesIO(image)))[0, 0].astype(int)
            off = generator(int(pixel[0]), int(pixel[1]), int(pixel[2])).normal(size=self.table.shape[1])
            rows.append(self.table[pixel[0] * 256 + pixel[1]] + self.noise * torch.from_numpy(off).float())
        return torch.nn.functional.normalize(torch.stack(rows), dim=-1)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        numbers = [[int(word) for word in text.replace(".", " ").split() if word.isdecimal()] for text in texts]
        # Other words move the vector a little, so that templates differ.
        rows = [self.table[n[-1]] + 0.05 * len(text) * self.table[-1] for n, text in zip(numbers, texts, strict=True)]
        return torch.nn.functional.normalize(torch.stack(rows), dim=-1)


def paint(number: int, variant: int = 0) -> bytes:
    """A PNG that shows a number to the toy encoder; variants differ in their noise."""
    file = io.BytesIO()
    Image.new("RGB", (20, 12), (number // 256, number % 256, variant)).save(file, "PNG")
    return file.getvalue()


def pack(path: Path, records: Sequence[Record]) -> Path:
    """Write a shard; each record maps extensions to bytes, str, int or (json) a tree."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for index, record in enumerate(records):
            for extension, value in record.items():
                is_bytes = isinstance(value, bytes)
                content = value if is_bytes else (json.dumps(value) if extension == "json" else str(value)).encode()
                member = tarfile.TarInfo(f"{index:05d}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path
