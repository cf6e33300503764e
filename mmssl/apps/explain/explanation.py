"""One image and one caption, explained."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mmssl.apps.explain.maps import DEFAULT, heat, image_maps
from mmssl.apps.explain.word_scores import word_scores
from mmssl.errors import UserError
from mmssl.inference import ImageInput, Model


@dataclass(frozen=True)
class Explanation:
    """What of an image and of a caption makes them alike."""

    caption: str
    similarity: float
    """Cosine of their vectors."""
    method: str
    """How the map was made."""
    image: Tensor
    """As the model sees it, uint8 [3, S, S]."""
    heat: Tensor
    """Where it speaks for the caption, in 0..1, float32 [S, S]."""
    words: list[tuple[str, float]]
    """Each word and how much the similarity falls without it."""


def explain(model: Model, image: ImageInput, caption: str, method: str | None = None) -> Explanation:
    """Explain why a model finds an image and a caption alike, or not.

    Args:
        method: a name in `mmssl.apps.explain.METHODS`. Default: `mmssl.apps.explain.DEFAULT`.

    Raises:
        UserError: the file is no image, the caption is empty, or the method cannot look at this tower.
        DecodeError: an image that is no file cannot be decoded.
    """
    if not caption.strip():
        raise UserError("the caption is empty; give the words whose place in the image is looked for")
    name = method or DEFAULT
    pixels = model.render(image)
    text_embedding = model.encode_text(caption)
    image_embedding = model.encode_image(pixels)
    maps = image_maps(model.encoder, pixels[None].to(model.device), text_embedding.to(model.device), name)
    return Explanation(
        caption=caption,
        similarity=float(image_embedding[0] @ text_embedding[0]),
        method=name,
        image=pixels,
        heat=heat(maps.cpu(), pixels.shape[-1])[0],
        words=word_scores(model, caption, image_embedding[0]),
    )


def overlay(image: Tensor, heat: Tensor) -> Tensor:
    """The image, paled and greyed, with the heat laid over it from clear to orange, uint8 [3, S, S]."""
    gray = image.float().mean(0, keepdim=True).expand(3, -1, -1)
    paled = 0.55 * gray + 0.45 * 255
    tone = torch.tensor([230.0, 80.0, 0.0])[:, None, None]
    strength = 0.8 * heat
    return (paled * (1 - strength) + tone * strength).round().clamp(0, 255).to(torch.uint8)
