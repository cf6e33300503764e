"""The interface of an objective: the encoder passes it needs, its predictions from them, and its loss.

A step calls these methods in order:

1. `on_step_start` with the fraction of the training done, then `sample_targets`, which draws masks, noise and
   permutations for all B samples of this process.
2. The union of all objectives' `required_passes` runs once.
3. `predict` maps encodings to tensors, each sample by itself. It may get a part of the batch.
4. `loss` returns a sum, and `num_terms` says of how many terms. A `batch_coupled` loss gets the predictions of the
   complete batch, because each sample's loss depends on the others; any other is summed over parts of the batch.
5. `on_step_end` lets the objective update its own state, such as a queue.
"""

import abc
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import ConfigDict
from torch import Tensor, nn

from mmssl.config import ObjectiveConfig, ViewConfig
from mmssl.distributed import World
from mmssl.errors import UserError
from mmssl.models import DualEncoder, Encoded, VisionTower
from mmssl.rng import RowRandom

Inputs = Mapping[str, Tensor]
"""Name -> tensor of B rows: `view.NAME`, `tokens`, `token_mask`, `tokens.1`, `token_mask.1`, ..., `ids`, `group.FIELD`,
and the results of `sample_targets`."""

Predictions = dict[str, Tensor]
"""Name -> tensor. For a batch-coupled loss: of b rows, or a scalar shared by all samples (a temperature)."""


@dataclass(frozen=True)
class EncoderPass:
    """A forward pass of one tower on one input. Equal passes of several objectives run once."""

    tower: Literal["vision", "text"]
    input: str
    """Name of the images or token ids among the inputs."""
    mask: str = ""
    """Text: name of the token mask. Vision: name of the patch indices to keep; empty for all patches."""
    keep_ratio: float = 1.0
    """Vision: fraction of the patches to keep."""


IMAGE = EncoderPass("vision", "view.main")
TEXT = EncoderPass("text", "tokens", "token_mask")

Features = Mapping[EncoderPass, Encoded]


@dataclass(frozen=True)
class Resized:
    """A view with the crop and the augmentations of the main view, at another size."""

    image_size: int
    """Side in pixels."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"


class SampleInputs(abc.ABC):
    """Further inputs of an objective, which the loader makes ahead of the step from captions and keys."""

    template: str | None = None
    """Template of the captions that it reads, such as `{english}`; None: those of training."""

    def __deepcopy__(self, memo: object) -> "SampleInputs":
        """Itself: it only reads, so copies of an objective share it."""
        return self

    @abc.abstractmethod
    def __call__(self, captions: list[str], keys: list[str]) -> dict[str, Tensor]:
        """Inputs of B samples by name, B rows each; `keys` are `shard:key`. Start each name with the objective's.

        Raises:
            UserError: a sample lacks what is needed.
        """

    @abc.abstractmethod
    def example(self, rows: int) -> dict[str, Tensor]:
        """Inputs of the same names and forms for synthetic samples, with which costs are measured."""


@dataclass(frozen=True)
class Vocabulary:
    """Properties of the tokenizer for objectives."""

    size: int
    mask_id: int | None
    special_ids: tuple[int, ...]
    continues_word: Tensor
    """True for tokens that continue the previous word, bool [size]."""
    max_tokens: int
    """Largest number of tokens in a caption."""


@dataclass(frozen=True)
class Output:
    """A loss and metrics as sums, so that micro-batches and processes combine exactly."""

    total: Tensor
    """Sum of the loss's terms, a scalar with gradient."""
    metrics: Mapping[str, tuple[Tensor, Tensor | float]] = field(default_factory=dict)
    """Name -> (sum, number of terms), without gradient."""


class ObjectiveOptions(ObjectiveConfig):
    """Weight and schedule of an objective; subclasses add their own fields. Unknown fields are an error."""

    model_config = ConfigDict(extra="forbid")


class Objective(nn.Module, abc.ABC):
    """One training objective. It owns its heads; the towers belong to the dual encoder."""

    Options: ClassVar[type[ObjectiveOptions]] = ObjectiveOptions
    """The typed options of the objective's configuration entry."""
    batch_coupled: ClassVar[bool] = False
    """The loss of one sample depends on the other samples of the global batch."""
    has_own_encoder: ClassVar[bool] = False
    """It runs its own encoder in `sample_targets`, outside the common forward pass."""
    is_reference: ClassVar[bool] = False
    """It pairs images with captions, so the gradients of other objectives are compared with its gradient."""

    keeps_samples: ClassVar[bool] = False
    """It keeps values of every sample of the data, by the sample's number in `ids`."""

    def on_data(self, samples: int) -> None:
        """Called once before the training, if it `keeps_samples`, with their number. Not where costs are measured."""

    def views(self) -> Mapping[str, ViewConfig | Resized]:
        """Views needed in addition to `main`, by name."""
        return {}

    def images(self) -> int:
        """Number of images of a sample that are needed; the second is the input `view.main.1`."""
        return 1

    def captions(self) -> int:
        """Number of captions of a sample that are needed; the second is the input `tokens.1` with `token_mask.1`."""
        return 1

    def groups(self) -> tuple[str, ...]:
        """Fields of the samples whose values tell groups: inputs `group.FIELD`, int64 [B], equal for equal values.
        `caption` stands for the caption."""
        return ()

    def sample_inputs(self) -> SampleInputs | None:
        """The maker of inputs needed in addition to views and tokens; None without any."""
        return None

    def on_resume(self) -> None:
        """Called when a checkpoint has been restored. Raise UserError if the run cannot go on as it was."""

    def on_step_start(self, progress: float) -> None:
        """Called at the start of a step, at the fraction `progress` of the training (0 to 1)."""

    def sample_targets(self, inputs: Inputs, random: RowRandom, encoder: DualEncoder) -> dict[str, Tensor]:
        """Random targets and new inputs for all B samples of this process, by name. Called once per step, without
        gradients. With `random`, a sample gets the same values at any number of processes. Start each name with the
        objective's name.
        """
        return {}

    def num_terms(self, inputs: Inputs) -> Tensor:
        """Number of terms in the loss of these samples: one per sample, or one per batch if `batch_coupled`."""
        ids = inputs["ids"]
        # Not torch.tensor(..., device=...), which waits for the device.
        return torch.full((), 1.0 if self.batch_coupled else float(len(ids)), device=ids.device)

    def on_step_end(self, inputs: Inputs, world: World) -> None:
        """Called once per step with all samples of this process, after the backward pass and without gradients."""

    def visualize(self, predictions: Predictions, inputs: Inputs, encoder: DualEncoder) -> Tensor | None:
        """Images to look at, uint8 [b, columns, 3, H, W], one row per sample; None if there are none."""
        return None

    @classmethod
    def chance_loss(cls, batch_size: int) -> float | None:
        """Lowest loss of a model that ignores its inputs, at this global batch size; None if unknown."""
        return None

    @classmethod
    def alarms(cls, metrics: Mapping[str, float]) -> dict[str, str]:
        """Problems in the metrics of one step: kind -> one line for the log, which is written once per run.

        `metrics` has `loss` and the metrics of `Output`.
        """
        return {}

    @abc.abstractmethod
    def required_passes(self) -> tuple[EncoderPass, ...]:
        """The encoder passes that `predict` reads."""

    @abc.abstractmethod
    def predict(self, features: Features, inputs: Inputs, encoder: DualEncoder) -> Predictions:
        """Predictions for some samples from their encodings. If `batch_coupled`, row i depends on sample i only."""

    @abc.abstractmethod
    def loss(self, predictions: Predictions, inputs: Inputs, world: World) -> Output:
        """The loss. If `batch_coupled`, its mean over processes must be the loss of the global batch."""


def classification(logits: Tensor, labels: Tensor) -> Output:
    """Cross-entropy and accuracy with one label per sample: logits [b, classes], labels int64 [b]."""
    hits = (logits.detach().argmax(1) == labels).sum()
    total = F.cross_entropy(logits.float(), labels, reduction="sum")
    return Output(total, {"accuracy": (hits, float(len(labels)))})


def token_grid(vision: VisionTower, name: str) -> tuple[int, int]:
    """Width of a vision tower's tokens, and their number per side. Objective `name` predicts from them.

    Raises:
        UserError: the tower has no tokens.
    """
    if vision.drops_patches:
        raise UserError(
            f"objectives.{name} predicts from every patch, but the vision tower leaves out patches in training; "
            f"remove patch_dropout or patch_drop_rate from model.vision.options"
        )
    if vision.token_width is None or vision.places is None:
        raise UserError(
            f"objectives.{name}: this vision tower has neither patch tokens nor a feature map; ViTs of open_clip and "
            f"timm, ResNets and ConvNeXts do"
        )
    return vision.token_width, vision.places
