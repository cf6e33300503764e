"""An exported folder as an encoder, and the images and captions on which it is compared with the model."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
from PIL import Image
from tokenizers import normalizers
from torch import Tensor

from mmssl.data.transforms import Tokenizer, decoding
from mmssl.errors import UserError
from mmssl.evaluate import encode
from mmssl.inference import Model
from mmssl.rng import torch_generator

_QUOTES = {"[\u02bc\u2018-\u201b]": "'", "[\u201c-\u201f]": '"'}
"""Curved quotation marks, as ftfy lists them, and the straight ones."""
CAPTIONS = ("a", "a red apple on a table", "two dogs run along the beach, seen from above", " ".join(["word"] * 200))


def images(model: Model, count: int = 5) -> Tensor:
    """Random pixels, uint8 [count, 3, S, S]."""
    side = model.vision.image_size
    return torch.randint(256, (count, 3, side, side), generator=torch_generator("export"), dtype=torch.uint8)


class Reader:
    """An exported folder as an encoder for `mmssl.evaluate`: rendering, tokenizer and towers of another library."""

    def __init__(self, images: Callable[[Sequence[bytes]], Tensor], texts: Callable[[list[str]], Tensor]) -> None:
        """Args:
        images, texts: the bytes of image files, and texts, to features [N, D] of any length.
        """
        self._images = images
        self._texts = texts

    @torch.no_grad()
    def encode_image(self, images: Sequence[bytes]) -> Tensor:
        """The bytes of image files -> unit vectors [N, D]."""
        return unit(self._images(images))

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Texts -> unit vectors [N, D]."""
        return unit(self._texts(list(texts)))


def pillow(images: Sequence[bytes]) -> list[Image.Image]:
    """The bytes of image files as upright RGB images; decoded here, because libraries differ in the files they open."""
    return [Image.fromarray(decoding.decode(image)) for image in images]


def largest_difference(model: Model, theirs: encode.Encoder) -> float:
    """The largest absolute difference of any entry of the features of random images and of CAPTIONS, each alone and
    all together, as batches of another size and padding may differ."""
    pixels, texts = images(model), list(CAPTIONS)
    files = png_files(pixels)
    ours, captions = model.encode_rendered(pixels), model.encode_text(texts)
    pairs = [(theirs.encode_image(files), ours), (theirs.encode_image(files[:1]), ours[:1])]
    pairs += [(theirs.encode_text(texts), captions)]
    pairs += [(theirs.encode_text([text]), row[None]) for text, row in zip(texts, captions, strict=True)]
    return max(float((unit(found) - expected).abs().max()) for found, expected in pairs)


def unit(features: Tensor) -> Tensor:
    """Unit vectors, float32 on the CPU."""
    return torch.nn.functional.normalize(features.float().cpu(), dim=-1)


def png_files(images: Tensor) -> list[bytes]:
    """Images, uint8 [N, 3, S, S], as the bytes of PNG files."""
    streams = [io.BytesIO() for _ in images]
    for stream, image in zip(streams, images, strict=True):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(stream, "PNG")
    return [stream.getvalue() for stream in streams]


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a tokenizer that straightens curved quotation marks by itself, as captions are cleaned here before it.

    Classes of transformers that build their own steps, such as CLIPTokenizer, leave this one out.
    """
    tokenizer.save(folder)
    written = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    steps = [normalizers.Replace(tokenizers.Regex(curved), straight) for curved, straight in _QUOTES.items()]
    written.normalizer = normalizers.Sequence([*steps, *([] if written.normalizer is None else [written.normalizer])])
    written.save(str(folder / "tokenizer.json"))


def missing_package(package: str, problem: ImportError) -> UserError:
    """The error for a missing package."""
    return UserError(f"this export needs {package} ({problem}); pip install 'mmssl[export]'")


def state(module: Any, prefix: str = "") -> dict[str, Tensor]:
    """The weights of a module on the CPU, contiguous; `prefix` stands before each name."""
    return {
        f"{prefix}{name}": tensor.detach().cpu().contiguous().clone() for name, tensor in module.state_dict().items()
    }
