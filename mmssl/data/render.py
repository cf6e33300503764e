"""Samples to what a model trains on: every view of the picture, and a caption."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmssl.data.augment import draw
from mmssl.data.captions import check_templates, render_caption
from mmssl.data.decode import DecodeError, decode, read_header
from mmssl.data.views import View
from mmssl.rng import generator
from mmssl.types import Sample, UserError


@dataclass(frozen=True)
class Rendered:
    """Rendered samples, in their order."""

    views: dict[str, Tensor]
    """View name -> uint8 [n, 3, S, S]; the rows of bad samples are black."""
    texts: list[str]
    """Captions; those of bad samples are empty."""
    bad: list[tuple[int, str]]
    """Row and reason of every sample that could not be used."""


class Renderer:
    """Renders samples; (seed, epoch, sample id) fixes the result, whatever the workers and the batch."""

    def __init__(self, views: dict[str, View], templates: Sequence[str], seed: int) -> None:
        """Raises UserError for a malformed caption template."""
        check_templates(templates)
        self.views = views
        self.templates = list(templates)
        self.seed = seed

    def __call__(self, samples: Sequence[Sample], epoch: int) -> Rendered:
        """Render samples for an epoch; what cannot be used is listed, never raised."""
        pictures = {
            name: torch.zeros(len(samples), 3, view.image_size, view.image_size, dtype=torch.uint8)
            for name, view in self.views.items()
        }
        texts, bad = [""] * len(samples), []
        for row, sample in enumerate(samples):
            try:
                text = self._caption(sample, epoch)
                for name, picture in self._pictures(sample, epoch).items():
                    pictures[name][row] = picture
                texts[row] = text
            except (DecodeError, UserError) as error:
                bad.append((row, str(error)))
        return Rendered(pictures, texts, bad)

    def _caption(self, sample: Sample, epoch: int) -> str:
        rng = generator(self.seed, "caption", epoch, sample.id)
        text = render_caption(sample.fields, self.templates, rng)
        if not text.strip():
            raise UserError("the caption is empty")
        return text

    def _pictures(self, sample: Sample, epoch: int) -> dict[str, Tensor]:
        """Every view of one picture, which is decoded once at the smallest size that serves them all."""
        if not self.views:
            return {}
        header = read_header(sample.image, min(view.max_pixels for view in self.views.values()))
        plans = []
        for name, view in self.views.items():
            draws = draw(generator(self.seed, "view", name, epoch, sample.id))
            plans.append((name, view, draws, view.crop(header, draws)))
        reduce = min(view.reduction(header, crop) for _, view, _, crop in plans)
        pixels = decode(sample.image, header, reduce)
        return {name: view.paint(pixels, header, crop, draws) for name, view, draws, crop in plans}
