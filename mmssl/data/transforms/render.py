"""Samples to training inputs: every view of the image, a caption, and numbers of the groups it belongs to."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmssl.data.transforms.augment import has_augmentations
from mmssl.data.transforms.augment_params import AugmentParams, draw_params, to_rows
from mmssl.data.transforms.caps import DecodeError
from mmssl.data.transforms.captions import CAPTION_GROUP, check_templates, clean_caption, render_caption
from mmssl.data.transforms.decoding import decode, read_header
from mmssl.data.transforms.views import View, empty_images
from mmssl.errors import UserError
from mmssl.rng import generator, torch_seed
from mmssl.types import Sample


@dataclass(frozen=True)
class Rendered:
    """Rendered samples, in input order."""

    views: dict[str, Tensor]
    """View name -> uint8 [n, 3, S, S]; the rows of bad samples are black."""
    texts: list[str]
    """Captions; empty for bad samples."""
    bad: list[tuple[int, str]]
    """Row and error of every unusable sample."""
    augment_params: dict[str, Tensor]
    """View name -> augmentation parameters, float64 [n, SCALARS], for views that are augmented on the device."""
    groups: dict[str, Tensor] = field(default_factory=dict)
    """Field -> number of each sample's value there, int64 [n]."""


class Renderer:
    """Renders samples. The result depends on (seed, epoch, sample id) alone, not on workers or batches."""

    def __init__(
        self,
        views: dict[str, View],
        templates: Sequence[str],
        seed: int,
        max_caption_chars: int = 20_000,
        augment_on_device: bool = False,
        groups: Sequence[str] = (),
    ) -> None:
        """
        Args:
            augment_on_device: only crop and resize, and return the augmentation parameters.
            groups: fields whose values are numbered, as in `group_number`.

        Raises:
            UserError: a malformed caption template.
        """
        check_templates(templates)
        self.views = views
        self.templates = list(templates)
        self.seed = seed
        self.max_caption_chars = max_caption_chars
        self.groups = list(groups)
        self.on_device = {name for name, view in views.items() if augment_on_device and has_augmentations(view.config)}

    def __call__(self, samples: Sequence[Sample], epoch: int) -> Rendered:
        """Render samples for an epoch. Unusable samples are listed, never raised."""
        views = {name: empty_images(len(samples), view.image_size) for name, view in self.views.items()}
        bad: dict[int, str] = {}
        # Captions and parameters come first: decoding an image evicts everything from the CPU caches.
        texts = [self._caption(row, sample, epoch, bad) for row, sample in enumerate(samples)]
        params = {
            name: [draw_params(generator(self.seed, "view", name, epoch, sample.id)) for sample in samples]
            for name in self.views
        }
        for row, sample in enumerate(samples):
            if row in bad or not views:
                continue
            try:
                painted = self._paint(sample.image, {name: params[name][row] for name in views})
            except DecodeError as error:
                bad[row], texts[row] = str(error), ""
                continue
            for name, image in painted.items():
                views[name][row] = image
        for row in bad:
            for view in views.values():
                view[row] = 0
        on_device = {name: to_rows(params[name]) for name in self.views if name in self.on_device}
        pairs = list(zip(samples, texts, strict=True))
        groups = {name: torch.tensor([group_number(name, *pair) for pair in pairs]) for name in self.groups}
        return Rendered(views, texts, sorted(bad.items()), on_device, groups)

    def _caption(self, row: int, sample: Sample, epoch: int, bad: dict[int, str]) -> str:
        # Most captions need no randomness, and creating a generator takes 16 microseconds.
        has_lists = any(isinstance(value, (list, tuple)) for value in sample.fields.values())
        is_drawn = len(self.templates) > 1 or has_lists or "\n" in str(sample.fields.get("txt", "")).strip()
        rng = generator(self.seed, "caption", epoch, sample.id) if is_drawn else None
        try:
            text = render_caption(sample.fields, self.templates, rng)
        except UserError as error:
            bad[row] = str(error)
            return ""
        if not text.strip():
            bad[row] = "the caption is empty"
            return ""
        if len(text) > self.max_caption_chars:
            bad[row] = f"the caption has {len(text)} characters, more than {self.max_caption_chars}"
            return ""
        return text

    def _paint(self, image: bytes, params: dict[str, AugmentParams[float]]) -> dict[str, Tensor]:
        """Every view of one image, decoded once, at the smallest size that serves all views."""
        header = read_header(image, min(view.max_pixels for view in self.views.values()))
        crops = {name: view.crop(header, params[name]) for name, view in self.views.items()}
        reduce = min(view.reduction(header, crops[name]) for name, view in self.views.items())
        pixels = decode(image, header, reduce)
        return {
            name: view.paint(pixels, header, crops[name], None if name in self.on_device else params[name])
            for name, view in self.views.items()
        }


def group_number(name: str, sample: Sample, caption: str) -> int:
    """A number from 0 to 2^63 - 1 that samples with the same value of a field share, on every machine.

    The value is a field of the .json or the label `cls`; `caption` stands for the caption, with white space and
    entities cleaned. A sample without a value (no field, null, an empty text, NaN) is alone in its group.
    """
    if name == CAPTION_GROUP:
        return torch_seed("caption", clean_caption(caption))
    value = sample.fields.get(name)
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        value = int(value)  # tables with gaps store whole numbers as floats
    if value in (None, "", [], {}) or (isinstance(value, float) and math.isnan(value)):
        return torch_seed("sample", sample.id)
    return torch_seed("value", json.dumps(value, sort_keys=True))
