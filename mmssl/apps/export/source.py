"""A pretrained model as it is read here, compared with the library that it comes from."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mmssl.apps.export.reader import Reader, largest_difference, pillow
from mmssl.errors import UserError, one_line
from mmssl.inference import Model
from mmssl.models.pretrained import is_transformers_folder

TOLERANCE = 1e-4
"""Largest difference of an entry of unit vectors that rounding explains."""


@dataclass(frozen=True)
class Agreement:
    """A comparison of unit vectors."""

    difference: float
    """The largest difference of any entry, for random images of the model's size and for captions."""
    cosine: float | None
    """The smallest cosine for the given images, which each library resizes by itself; None without any."""

    @property
    def holds(self) -> bool:
        """True if the difference is one of rounding."""
        return self.difference <= TOLERANCE


def compare_with_source(source: str, model: Model, images: Sequence[Path] = ()) -> Agreement:
    """Compare a model with the towers, preprocessing and tokenizer of the library that wrote its weights.

    Args:
        source: as `mmssl.load` takes it.
        model: the same, loaded here.
        images: files of any size.

    Raises:
        UserError: it is a model of mmssl, has random weights, or its own library cannot read it or an image.
    """
    theirs = _reader(source, model)
    difference = largest_difference(model, theirs)
    if not images:
        return Agreement(difference, None)
    expected = theirs.encode_image([path.read_bytes() for path in images])
    return Agreement(difference, float((model.encode_image(list(images)) * expected).sum(1).min()))


def _reader(source: str, model: Model) -> Reader:
    library, _, name = source.partition(":")
    folder = Path(source)
    try:
        if library in ("open_clip", "local-dir") and name:
            return _open_clip(name if library == "open_clip" else source)
        if (folder / "open_clip_config.json").is_file():
            return _open_clip(f"local-dir:{folder}")
        if library == "transformers" and name:
            return _transformers(name, model)
        if is_transformers_folder(folder):
            return _transformers(source, model)
    except UserError:
        raise
    except Exception as error:  # libraries raise many kinds
        raise UserError(f"{source} cannot be read by its own library: {one_line(error)}") from error
    raise UserError(f"{source} is no model of open_clip or transformers, so there is no other library to compare with")


def _open_clip(source: str) -> Reader:
    import open_clip

    complete = source.startswith(("local-dir:", "hf-hub:"))
    name, _, weights = (source, "", "") if complete else source.partition("/")
    if not complete and not weights:
        raise UserError(f"open_clip:{source} has random weights; give open_clip:{source}/TAG")
    theirs, transform = open_clip.create_model_from_pretrained(name, pretrained=weights or None)
    tokenizer = open_clip.get_tokenizer(name)
    theirs.eval()
    return Reader(
        lambda images: theirs.encode_image(torch.stack([transform(image) for image in pillow(images)])),
        lambda texts: theirs.encode_text(tokenizer(texts)),
    )


def _transformers(name: str, model: Model) -> Reader:
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    theirs = AutoModel.from_pretrained(name, dtype=torch.float32, trust_remote_code=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    # SigLIP was trained with padding in its captions.
    padding = "max_length" if theirs.config.model_type == "siglip" else True
    side = model.vision.image_size

    def words(texts: list[str]) -> dict[str, torch.Tensor]:
        found = tokenizer(
            texts, padding=padding, truncation=True, max_length=model.config.text.max_tokens, return_tensors="pt"
        )
        wanted = ("input_ids",) if padding == "max_length" else ("input_ids", "attention_mask")
        return {key: found[key] for key in wanted}

    return Reader(
        # One forward gives both; the other side is a placeholder.
        lambda images: (
            theirs(
                **words(["a"]), pixel_values=processor(images=pillow(images), return_tensors="pt")["pixel_values"]
            ).image_embeds
        ),
        lambda texts: theirs(**words(texts), pixel_values=torch.zeros(1, 3, side, side)).text_embeds,
    )
