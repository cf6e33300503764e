"""Samples to what a model trains on: every view of the image, and a caption."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from mmssl.data.transforms.augment import augments
from mmssl.data.transforms.augment_params import AugmentParams, draw_params, to_rows
from mmssl.data.transforms.captions import check_templates, render_caption
from mmssl.data.transforms.decode import DecodeError, decode, read_header
from mmssl.data.transforms.views import View, empty_images
from mmssl.errors import UserError
from mmssl.rng import generator
from mmssl.types import Sample


@dataclass(frozen=True)
class Rendered:
    """Rendered samples, in their order."""

    views: dict[str, Tensor]
    """View name -> uint8 [n, 3, S, S]; the rows of bad samples are black."""
    texts: list[str]
    """Captions; those of bad samples are empty."""
    bad: list[tuple[int, str]]
    """Row and reason of every sample that could not be used."""
    augment_params: dict[str, Tensor]
    """View name -> numbers of its images' changes, float64 [n, SCALARS], where these are left to others."""


class Renderer:
    """Renders samples; (seed, epoch, sample id) fixes the result, whatever the workers and the batch."""

    def __init__(
        self,
        views: dict[str, View],
        templates: Sequence[str],
        seed: int,
        max_caption_chars: int = 20_000,
        augment_on_device: bool = False,
    ) -> None:
        """With `augment_on_device`, images are cut and resized only, and what was drawn for them comes beside.

        Raises:
            UserError: a malformed caption template.
        """
        check_templates(templates)
        self.views = views
        self.templates = list(templates)
        self.seed = seed
        self.max_caption_chars = max_caption_chars
        self.left = {name for name, view in views.items() if augment_on_device and augments(view.config)}

    def __call__(self, samples: Sequence[Sample], epoch: int) -> Rendered:
        """Render samples for an epoch; what cannot be used is listed, never raised."""
        views = {name: empty_images(len(samples), view.image_size) for name, view in self.views.items()}
        bad: dict[int, str] = {}
        # All the small work before the images: decoding empties the processor's caches every time.
        texts = [self._caption(row, sample, epoch, bad) for row, sample in enumerate(samples)]
        augment_params = {
            name: [draw_params(generator(self.seed, "view", name, epoch, sample.id)) for sample in samples]
            for name in self.views
        }
        for row, sample in enumerate(samples):
            if row in bad or not views:
                continue
            try:
                painted = self._paint(sample.image, {name: augment_params[name][row] for name in views})
            except DecodeError as error:
                bad[row], texts[row] = str(error), ""
                continue
            for name, image in painted.items():
                views[name][row] = image
        for row in bad:
            for view in views.values():
                view[row] = 0
        left = {name: to_rows(augment_params[name]) for name in self.views if name in self.left}
        return Rendered(views, texts, sorted(bad.items()), left)

    def _caption(self, row: int, sample: Sample, epoch: int, bad: dict[int, str]) -> str:
        # Few captions are drawn, and a generator takes 16 microseconds to make.
        is_drawn = len(self.templates) > 1 or any(isinstance(v, (list, tuple)) for v in sample.fields.values())
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

    def _paint(self, image: bytes, augment_params: dict[str, AugmentParams[float]]) -> dict[str, Tensor]:
        """Every view of one image, which is decoded once, at the smallest size that serves them all."""
        header = read_header(image, min(view.max_pixels for view in self.views.values()))
        crops = {name: view.crop(header, augment_params[name]) for name, view in self.views.items()}
        reduce = min(view.reduction(header, crops[name]) for name, view in self.views.items())
        pixels = decode(image, header, reduce)
        return {
            name: view.paint(pixels, header, crops[name], None if name in self.left else augment_params[name])
            for name, view in self.views.items()
        }
