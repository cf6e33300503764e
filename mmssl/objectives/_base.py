"""What an objective is: which encodings it needs, what it predicts from them, and its loss.

A step runs in this order, each part on the whole of a process's batch or on micro-batches of it:

1. `begin` tells the part of the training that is done; `prepare` draws everything random (masks, noise, permutations)
   for the whole batch as tensors of B rows.
2. The union of all objectives' `required_passes` runs once.
3. `predict` maps the encodings of some samples to tensors, sample by sample.
4. `loss` maps predictions to a sum and the number of terms in it. A `batch_coupled` loss sees the predictions of the
   whole batch, because each sample's loss depends on the others; any other may be summed over parts of the batch.
5. `finish` lets the objective keep something of the whole batch (a queue).
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
from mmssl.models.dual_encoder import DualEncoder
from mmssl.models.vision import Encoded, VisionTower
from mmssl.rng import RowRandom

Inputs = Mapping[str, Tensor]
"""Name -> tensor of B rows: `view.NAME`, `tokens`, `token_mask`, `ids`, and what objectives prepare."""

Predictions = dict[str, Tensor]
"""What a loss reads. If it is coupled: name -> tensor of b rows, or a scalar shared by all samples (a temperature)."""


@dataclass(frozen=True)
class EncoderPass:
    """One encoding a step needs; equal ones are run once."""

    tower: Literal["vision", "text"]
    input: str
    """Name of the images or token ids among the inputs."""
    mask: str = ""
    """Text: name of the token mask. Vision: name of the patch indices to keep; empty for all patches."""


IMAGE = EncoderPass("vision", "view.main")
TEXT = EncoderPass("text", "tokens", "token_mask")

Features = Mapping[EncoderPass, Encoded]


@dataclass(frozen=True)
class Vocabulary:
    """What objectives need to know of the tokenizer."""

    size: int
    mask_id: int | None
    special_ids: tuple[int, ...]
    continues_word: Tensor
    """True where a token continues the word before it, bool [size]."""
    max_tokens: int
    """No caption has more."""


@dataclass(frozen=True)
class Output:
    """A loss as a sum and what it runs over, so that micro-batches and processes combine exactly."""

    total: Tensor
    """Sum of the loss's terms, a scalar with gradient."""
    metrics: Mapping[str, tuple[Tensor, Tensor | float]] = field(default_factory=dict)
    """Name -> (sum, number of terms), without gradient."""


class ObjectiveOptions(ObjectiveConfig):
    """Weight and schedule of an objective; subclasses add their own fields. Unknown ones are refused."""

    model_config = ConfigDict(extra="forbid")


class Objective(nn.Module, abc.ABC):
    """One training objective. Subclasses own their heads and nothing of the towers."""

    Options: ClassVar[type[ObjectiveOptions]] = ObjectiveOptions
    """The typed options of the objective's configuration entry."""
    batch_coupled: ClassVar[bool] = False
    """The loss of one sample depends on the other samples of the global batch."""
    has_own_encoder: ClassVar[bool] = False
    """It runs an encoder of its own in `prepare`, outside of the mixer's forward."""

    def views(self) -> dict[str, ViewConfig]:
        """Renderings needed beside `main`, by name."""
        return {}

    def on_step_start(self, progress: float) -> None:
        """A step begins after the part `progress` of the training (0 to 1)."""

    def sample_targets(self, inputs: Inputs, random: RowRandom, encoder: DualEncoder) -> dict[str, Tensor]:
        """Tensors of B rows for the whole batch of this process: what is random, the same rows at any number of
        processes, and what needs no gradient. Called once a step, without gradients; names begin with the objective's.
        """
        return {}

    def num_terms(self, inputs: Inputs) -> Tensor:
        """Number of terms in the loss of these samples; by default one a sample, and one a batch if `batch_coupled`."""
        ids = inputs["ids"]
        # Not torch.tensor(..., device=...), which waits for the device.
        return torch.full((), 1.0 if self.batch_coupled else float(len(ids)), device=ids.device)

    def on_step_end(self, inputs: Inputs, world: World) -> None:
        """Called once a step with the whole batch of this process, after its gradients; no gradients here."""

    def visualize(self, predictions: Predictions, inputs: Inputs, encoder: DualEncoder) -> Tensor | None:
        """What a person would look at: uint8 [b, columns, 3, H, W], one row of images a sample."""
        return None

    @abc.abstractmethod
    def required_passes(self) -> tuple[EncoderPass, ...]:
        """The encodings `predict` reads."""

    @abc.abstractmethod
    def predict(self, features: Features, inputs: Inputs, encoder: DualEncoder) -> Predictions:
        """Predictions for some samples from their encodings. If `batch_coupled`: row i depends on sample i only."""

    @abc.abstractmethod
    def loss(self, predictions: Predictions, inputs: Inputs, world: World) -> Output:
        """The loss. If `batch_coupled`: its mean over processes must be the loss of the global batch."""


def classification(logits: Tensor, labels: Tensor) -> Output:
    """Cross-entropy and accuracy of one label a sample: logits [b, classes], labels int64 [b]."""
    hits = (logits.detach().argmax(1) == labels).sum()
    total = F.cross_entropy(logits.float(), labels, reduction="sum")
    return Output(total, {"accuracy": (hits, float(len(labels)))})


def token_grid(vision: VisionTower, name: str) -> tuple[int, int]:
    """Width of a vision tower's tokens and how many places a side they have; objective `name` predicts from them.

    Raises:
        UserError: the tower shows none.
    """
    if vision.token_width is None or vision.places is None:
        raise UserError(
            f"objectives.{name}: this vision tower shows neither patches nor a feature map; ViTs of open_clip and "
            f"timm, ResNets and ConvNeXts do"
        )
    return vision.token_width, vision.places
