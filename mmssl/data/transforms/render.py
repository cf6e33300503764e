"""Samples to training inputs: every view of the image, a caption, and numbers of the groups it belongs to."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmssl.data.transforms.augment import has_augmentations
from mmssl.data.transforms.augment_params import AugmentParams, draw_params, to_rows
from mmssl.data.transforms.caps import DecodeError
from mmssl.data.transforms.captions import (
    CAPTION_GROUP,
    IMAGE_ORDER,
    LONGEST,
    check_templates,
    clean_caption,
    further_captions,
    length_problem,
    render_caption,
)
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
    more_texts: list[list[str]] = field(default_factory=list)
    """The second captions of all samples, the third ones, ...; as many lists as were asked for."""
    readings: dict[str, list[str]] = field(default_factory=dict)
    """Template -> the captions of all samples by it, beside those of training."""


class Renderer:
    """Renders samples. The result depends on (seed, epoch, sample id) alone, not on workers or batches."""

    def __init__(
        self,
        views: dict[str, View],
        templates: Sequence[str] | Mapping[str, float],
        seed: int,
        max_caption_chars: int = LONGEST,
        augment_on_device: bool = False,
        groups: Sequence[str] = (),
        captions: int = 1,
        readings: Sequence[str] = (),
    ) -> None:
        """
        Args:
            views: by name. Of a sample with several images, one is drawn for an epoch; `main.1` shows the next one.
            templates: of captions, equally likely or with their weights.
            augment_on_device: only crop and resize, and return the augmentation parameters.
            groups: fields whose values are numbered, as in `group_number`.
            captions: number of captions of each sample.
            readings: further templates, whose captions are rendered beside those of training.

        Raises:
            UserError: a malformed caption template.
        """
        self.views = views
        self.templates = list(templates)
        check_templates([*templates, *readings])
        weights = list(templates.values()) if isinstance(templates, Mapping) else []
        self.weights = [weight / sum(weights) for weight in weights]
        self.captions = captions
        self.readings = list(readings)
        self.seed = seed
        self.max_caption_chars = max_caption_chars
        self.groups = list(groups)
        self.on_device = {name for name, view in views.items() if augment_on_device and has_augmentations(view.config)}

    def __call__(self, samples: Sequence[Sample], epoch: int) -> Rendered:
        """Render samples for an epoch. Unusable samples are listed, never raised."""
        views = {name: empty_images(len(samples), view.image_size) for name, view in self.views.items()}
        bad: dict[int, str] = {}
        # Captions and parameters come first: decoding an image evicts everything from the CPU caches.
        found = [self._captions(row, sample, epoch, bad) for row, sample in enumerate(samples)]
        params = {
            name: [draw_params(generator(self.seed, "view", view.like or name, epoch, sample.id)) for sample in samples]
            for name, view in self.views.items()
        }
        for row, sample in enumerate(samples):
            if row in bad or not views:
                continue
            try:
                painted = self._paint(sample, epoch, {name: params[name][row] for name in views})
            except DecodeError as error:
                bad[row], found[row] = str(error), [""] * len(found[row])
                continue
            for name, image in painted.items():
                views[name][row] = image
        for row in bad:
            for view in views.values():
                view[row] = 0
        on_device = {name: to_rows(params[name]) for name in self.views if name in self.on_device}
        texts, *more = ([captions[place] for captions in found] for place in range(self.captions))
        readings = {
            template: [captions[self.captions + place] for captions in found]
            for place, template in enumerate(self.readings)
        }
        pairs = list(zip(samples, texts, strict=True))
        groups = {name: torch.tensor([self._group(name, *pair, epoch) for pair in pairs]) for name in self.groups}
        return Rendered(views, texts, sorted(bad.items()), on_device, groups, more, readings)

    def _captions(self, row: int, sample: Sample, epoch: int, bad: dict[int, str]) -> list[str]:
        """The captions of a sample, then its readings; empty ones if it is bad."""
        nothing = [""] * (self.captions + len(self.readings))
        # Most captions need no randomness, and creating a generator takes 16 microseconds.
        has_lists = any(isinstance(value, (list, tuple)) for value in sample.fields.values())
        is_drawn = len(self.templates) > 1 or has_lists or "\n" in str(sample.fields.get("txt", "")).strip()
        rng = generator(self.seed, "caption", epoch, sample.id) if is_drawn else None
        try:
            texts = [render_caption(sample.fields, self.templates, rng, self.weights)]
            if self.captions > 1:
                further = generator(self.seed, "further captions", epoch, sample.id)
                texts += further_captions(sample.fields, self.templates, texts[0], self.captions - 1, further)
            for template in self.readings:
                # The same draws: of lists that translate each other, the same place.
                again = generator(self.seed, "caption", epoch, sample.id) if has_lists else None
                texts.append(render_caption(sample.fields, [template], again))
        except UserError as error:
            bad[row] = str(error)
            return nothing
        if not all(text.strip() for text in texts):
            bad[row] = "the caption is empty"
        elif (problem := length_problem(max(texts, key=len), self.max_caption_chars)) is not None:
            bad[row] = problem
        return nothing if row in bad else texts

    def _paint(self, sample: Sample, epoch: int, params: dict[str, AugmentParams[float]]) -> dict[str, Tensor]:
        """Every view of one sample."""
        images = (sample.image, *sample.more_images)
        if len(images) == 1:
            return self._paint_image(sample.image, params)
        order = self._order(sample, epoch)
        by_image: dict[int, list[str]] = {}
        for name in params:
            by_image.setdefault(order[image_place(name) % len(images)], []).append(name)
        painted: dict[str, Tensor] = {}
        for number, names in by_image.items():
            painted |= self._paint_image(images[number], {name: params[name] for name in names})
        return painted

    def _order(self, sample: Sample, epoch: int) -> list[int]:
        """The numbers of a sample's images in the order in which views show them."""
        count = 1 + len(sample.more_images)
        return generator(self.seed, "image", epoch, sample.id).permutation(count).tolist() if count > 1 else [0]

    def _group(self, name: str, sample: Sample, caption: str, epoch: int) -> int:
        """The number of a sample's value, or the code of the order of its images."""
        return order_code(self._order(sample, epoch)) if name == IMAGE_ORDER else group_number(name, sample, caption)

    def _paint_image(self, image: bytes, params: dict[str, AugmentParams[float]]) -> dict[str, Tensor]:
        """Views of one image, decoded once, at the smallest size that serves all of them."""
        views = {name: self.views[name] for name in params}
        header = read_header(image, min(view.max_pixels for view in views.values()))
        crops = {name: view.crop(header, params[name]) for name, view in views.items()}
        reduce = min(view.reduction(header, crops[name]) for name, view in views.items())
        pixels = decode(image, header, reduce)
        return {
            name: view.paint(pixels, header, crops[name], None if name in self.on_device else params[name])
            for name, view in views.items()
        }


def image_place(view: str) -> int:
    """Which of a sample's images a view shows, in the order that was drawn: 0, or 1 for `main.1`."""
    number = view.rpartition(".")[2]
    return int(number) if "." in view and number.isdecimal() else 0


def order_code(order: Sequence[int]) -> int:
    """The order of up to 15 images as one number: four bits for each shown one, its place among them from 1 on."""
    shown = list(order[:15])
    return sum((1 + sorted(shown).index(number)) << 4 * place for place, number in enumerate(shown))


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
