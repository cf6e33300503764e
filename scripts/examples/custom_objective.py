"""An objective of your own: predict the mean brightness of the image.

Save such a file as a module that Python finds from the working folder, and name it in the configuration:

    objectives:
      contrastive: {}
      scripts.examples.custom_objective: {weight: 0.1, tolerance: 0.05}
"""

import torch
from pydantic import Field
from torch import nn

from mmssl.distributed import World
from mmssl.models import DualEncoder
from mmssl.objectives import IMAGE, EncoderPass, Objective, ObjectiveOptions, Output, base


class BrightnessOptions(ObjectiveOptions):
    """Options of brightness prediction; `weight`, `start`, `end`, `ramp` and `every` are inherited."""

    weight: float = Field(0.1, ge=0)
    """Factor of its loss in the total."""
    tolerance: float = Field(0.1, gt=0, lt=1)
    """Largest error, as a fraction of full brightness, that counts as a hit."""


class Brightness(Objective):
    """Squared error of the predicted mean of all pixels, as a fraction of 255."""

    Options = BrightnessOptions

    def __init__(self, options: BrightnessOptions, encoder: DualEncoder, vocabulary: base.Vocabulary) -> None:
        super().__init__()
        self.tolerance = options.tolerance
        self.head = nn.Linear(encoder.vision.width, 1)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def required_passes(self) -> tuple[EncoderPass, ...]:
        """Read the encoding of the clean image, which the contrastive objective computes anyway."""
        return (IMAGE,)

    def predict(self, features: base.Features, inputs: base.Inputs, encoder: DualEncoder) -> base.Predictions:
        """Map pooled image vectors [b, width] to one number per sample."""
        return {"brightness": self.head(features[IMAGE].pooled)[:, 0]}

    def loss(self, predictions: base.Predictions, inputs: base.Inputs, world: World) -> Output:
        """Sum over samples; the base class counts one term per sample."""
        target = inputs["view.main"].float().mean((1, 2, 3)) / 255
        error = (predictions["brightness"].float() - target).square()
        hits = (error.detach() < self.tolerance**2).sum()
        return Output(error.sum(), {"accuracy": (hits, float(len(target)))})

    def on_step_end(self, inputs: base.Inputs, world: World) -> None:
        """Count the samples of all processes. Buffers are saved in checkpoints."""
        count = torch.full_like(self.get_buffer("seen"), len(inputs["ids"]))
        self.get_buffer("seen").add_(world.sum(count))
