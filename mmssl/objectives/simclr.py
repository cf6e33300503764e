"""Agreement of two views: of images by augmentation (SimCLR, Chen et al. 2020), of captions by dropout (SimCSE,
Gao et al. 2021)."""

from pydantic import Field, model_validator
from torch import Tensor

from mmssl.config import ViewConfig
from mmssl.distributed import World
from mmssl.losses import nt_xent
from mmssl.models.dual_encoder import DualEncoder
from mmssl.models.heads import mlp, unit
from mmssl.objectives._base import (
    IMAGE,
    TEXT,
    EncoderPass,
    Features,
    Inputs,
    Objective,
    ObjectiveOptions,
    Output,
    Predictions,
    Vocabulary,
)
from mmssl.objectives.contrastive import matching_accuracy
from mmssl.rng import RowRandom

STRONG_VIEW = ViewConfig(
    crop_scale=(0.2, 1.0), flip=0.5, color_jitter=0.8, color_jitter_strength=(0.4, 0.4, 0.4, 0.1), gray=0.2, blur=0.5
)
"""SimCLR's augmentation as SLIP and MoCo v3 use it."""
SECOND_TEXT = EncoderPass("text", "simclr.tokens", "token_mask")


class ViewOptions(ObjectiveOptions):
    """Options of what compares further views of the images."""

    view: ViewConfig = STRONG_VIEW
    """How the further image views are rendered."""
    head_width: int = Field(1024, ge=1)
    """Hidden width of the heads."""
    head_dim: int = Field(128, ge=1)
    """Dimensions in which the views are compared."""


class SimclrOptions(ViewOptions):
    """Options of the agreement of views."""

    image: bool = True
    """Two views of each image agree."""
    text: bool = False
    """Two encodings of each caption agree, which differ by the text tower's dropout."""
    with_main: bool = False
    """The first image view is `main`, which is encoded anyway: one more forward instead of two."""
    temperature: float = Field(0.1, gt=0)
    """Temperature of the images' loss."""
    text_temperature: float = Field(0.05, gt=0)
    """Temperature of the captions' loss."""

    @model_validator(mode="after")
    def _check(self) -> "SimclrOptions":
        if not self.image and not self.text:
            raise ValueError("objectives.simclr: image and text are both false; set one, or drop the objective")
        return self


class Simclr(Objective):
    """Each view picks the other view of the same thing among all other views of the global batch."""

    Options = SimclrOptions
    batch_coupled = True

    def __init__(self, options: SimclrOptions, encoder: DualEncoder, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.options = options
        size = (options.head_width, options.head_dim)
        self.image_head = mlp(encoder.vision.width, *size) if options.image else None
        self.text_head = mlp(encoder.text.width, *size) if options.text else None
        self.first = IMAGE if options.with_main else EncoderPass("vision", "view.simclr_1")
        self.second = EncoderPass("vision", "view.simclr_2")

    def views(self) -> dict[str, ViewConfig]:
        asked = (self.first, self.second) if self.options.image else ()
        return {f.input.removeprefix("view."): self.options.view for f in asked if f != IMAGE}

    def sample_targets(self, inputs: Inputs, random: RowRandom, encoder: DualEncoder) -> dict[str, Tensor]:
        # The same tokens under another name: equal forwards would run once, with one dropout.
        return {"simclr.tokens": inputs["tokens"]} if self.options.text else {}

    def required_passes(self) -> tuple[EncoderPass, ...]:
        images = (self.first, self.second) if self.options.image else ()
        return (*images, TEXT, SECOND_TEXT) if self.options.text else images

    def predict(self, features: Features, inputs: Inputs, encoder: DualEncoder) -> Predictions:
        predictions = {}
        pairs = (("image", self.image_head, self.first, self.second), ("text", self.text_head, TEXT, SECOND_TEXT))
        for name, head, first, second in pairs:
            if head is not None:
                predictions[f"{name}_1"] = unit(head(features[first].pooled))
                predictions[f"{name}_2"] = unit(head(features[second].pooled))
        return predictions

    def loss(self, predictions: Predictions, inputs: Inputs, world: World) -> Output:
        losses, metrics = [], {}
        temperatures = {"image": self.options.temperature, "text": self.options.text_temperature}
        for name, temperature in temperatures.items():
            if f"{name}_1" in predictions:
                first, second = predictions[f"{name}_1"], predictions[f"{name}_2"]
                losses.append(nt_xent(first, second, temperature, world=world))
                metrics[f"{name}_accuracy"] = matching_accuracy(first, second, world)
        return Output(sum(losses[1:], losses[0]), metrics)
