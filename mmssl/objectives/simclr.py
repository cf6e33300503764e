"""Contrast of two views: of images by augmentation (SimCLR, Chen et al. 2020), of captions by dropout (SimCSE, Gao et
al. 2021)."""

from pydantic import Field, model_validator
from torch import Tensor

from mmssl.config import ViewConfig
from mmssl.distributed import World
from mmssl.losses import nt_xent
from mmssl.models import DualEncoder, heads
from mmssl.objectives import base
from mmssl.objectives._pairs import matching_accuracy
from mmssl.rng import RowRandom

STRONG_VIEW = ViewConfig(
    crop_scale=(0.2, 1.0), flip=0.5, color_jitter=0.8, color_jitter_strength=(0.4, 0.4, 0.4, 0.1), gray=0.2, blur=0.5
)
"""SimCLR's augmentation as SLIP and MoCo v3 use it."""
SECOND_TEXT = base.EncoderPass("text", "simclr.tokens", "token_mask")


class ViewOptions(base.ObjectiveOptions):
    """Common options of objectives with additional image views."""

    view: ViewConfig = STRONG_VIEW
    """Augmentation of the additional image views."""
    head_width: int = Field(1024, ge=1)
    """Hidden width of the heads."""
    head_dim: int = Field(128, ge=1)
    """Dimension of the compared vectors."""


def two_views(
    options: ViewOptions, with_main: bool
) -> tuple[tuple[base.EncoderPass, base.EncoderPass], dict[str, ViewConfig]]:
    """The passes on two views of an image, and the views to request; `with_main`: the first is the main view.

    Objectives that compare two views name them alike, so that they share the passes.
    """
    names = [] if with_main else ["simclr_1"]
    views = [base.EncoderPass("vision", f"view.{name}") for name in (*names, "simclr_2")]
    first, second = views if len(views) == 2 else (base.IMAGE, views[0])
    return (first, second), dict.fromkeys([*names, "simclr_2"], options.view)


class SimclrOptions(ViewOptions):
    """Options of the contrast of views."""

    image: bool = True
    """Match two views of each image."""
    text: bool = False
    """Match two encodings of each caption, which differ by the text tower's dropout."""
    with_main: bool = False
    """Use `main` as the first image view. It is encoded anyway, so one more pass is needed instead of two."""
    temperature: float = Field(0.1, gt=0)
    """Temperature of the image loss."""
    text_temperature: float = Field(0.05, gt=0)
    """Temperature of the caption loss."""

    @model_validator(mode="after")
    def _check(self) -> "SimclrOptions":
        if not self.image and not self.text:
            raise ValueError("objectives.simclr: image and text are both false; set one, or drop the objective")
        return self


class Simclr(base.Objective):
    """Match each view with the other view of the same sample among all views of the global batch."""

    Options = SimclrOptions
    batch_coupled = True

    def __init__(self, options: SimclrOptions, encoder: DualEncoder, vocabulary: base.Vocabulary) -> None:
        super().__init__()
        self.options = options
        size = (options.head_width, options.head_dim)
        self.image_head = heads.mlp(encoder.vision.width, *size) if options.image else None
        self.text_head = heads.mlp(encoder.text.width, *size) if options.text else None
        (self.first, self.second), self.requested = two_views(options, options.with_main)

    def views(self) -> dict[str, ViewConfig]:
        return self.requested if self.options.image else {}

    def sample_targets(self, inputs: base.Inputs, random: RowRandom, encoder: DualEncoder) -> dict[str, Tensor]:
        # The same tokens under another name: equal passes would run once, with the same dropout.
        return {"simclr.tokens": inputs["tokens"]} if self.options.text else {}

    def required_passes(self) -> tuple[base.EncoderPass, ...]:
        images = (self.first, self.second) if self.options.image else ()
        return (*images, base.TEXT, SECOND_TEXT) if self.options.text else images

    def predict(self, features: base.Features, inputs: base.Inputs, encoder: DualEncoder) -> base.Predictions:
        predictions = {}
        pairs = (("image", self.image_head, self.first, self.second), ("text", self.text_head, base.TEXT, SECOND_TEXT))
        for name, head, first, second in pairs:
            if head is not None:
                predictions[f"{name}_1"] = heads.unit(head(features[first].pooled))
                predictions[f"{name}_2"] = heads.unit(head(features[second].pooled))
        return predictions

    def loss(self, predictions: base.Predictions, inputs: base.Inputs, world: World) -> base.Output:
        losses, metrics = [], {}
        temperatures = {"image": self.options.temperature, "text": self.options.text_temperature}
        for name, temperature in temperatures.items():
            if f"{name}_1" in predictions:
                first, second = predictions[f"{name}_1"], predictions[f"{name}_2"]
                losses.append(nt_xent(first, second, temperature, world=world))
                metrics[f"{name}_accuracy"] = matching_accuracy(first, second, world)
        return base.Output(sum(losses[1:], losses[0]), metrics)
