"""What objectives that pair images with captions share: which pairs are right, and further images and captions."""

import abc
from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from mmssl.distributed import World
from mmssl.errors import UserError
from mmssl.losses import logits
from mmssl.models import DualEncoder
from mmssl.objectives import _base as base
from mmssl.types import Groups

DIAGONAL = "diagonal"
ACCURACY_ROWS = 512
"""Number of images for accuracy in the batch: its cost is negligible next to the loss."""


class PairOptions(base.ObjectiveOptions):
    """Which pairs of an image and a caption are right."""

    positives: str = DIAGONAL
    """Right pairs. `diagonal`: an image and its own caption. `caption`: also images and captions of samples with the
    same caption. Any other name is a field of the .json (or `cls`): also those of samples with the same value there, as
    of one class or product; a sample without a value has only its own pair."""
    same: Literal["positives", "mask"] = "positives"
    """Use of the further pairs that `positives` finds. `positives`: they are right, and the loss of an image is the
    mean over its right captions (UniCL). `mask`: they are neither right nor wrong and left out of the loss."""
    images_per_sample: int = Field(1, ge=1, le=16)
    """Images of each sample in a step. All pairs of a sample's images and captions are right. A sample with fewer shows
    an image again, cropped anew."""
    captions_per_sample: int = Field(1, ge=1, le=16)
    """Captions of each sample in a step. A sample with fewer repeats one."""

    dims: list[Annotated[int, Field(ge=1)]] = Field([])
    """Numbers of first dimensions that shall work by themselves, such as [512, 256, 128, 64] (Matryoshka, Kusupati et
    al. 2022): the loss is the mean over them, each normalised. Name the full number (`model.embed_dim`) too, or the
    embeddings as a whole are not trained. Empty: only the whole."""
    form: Literal["auto", "plain", "blocked", "triton"] = "auto"
    """Computation of the loss. `plain`: with the matrix of all logits. `blocked`: one block of it at a time. `auto`:
    plain for small batches, else blocked. `triton`: blocked, in kernels for an NVIDIA GPU that multiply in bf16 and sum
    in fp32; it needs `positives: diagonal`."""

    @model_validator(mode="after")
    def _check_captions(self) -> "PairOptions":
        if self.captions_per_sample > 1 and self.positives == "caption":
            raise ValueError(
                "positives=caption compares one caption of each sample, and captions_per_sample gives several; use "
                "positives=diagonal or a field of the .json"
            )
        if self.form == "triton" and (
            self.positives != DIAGONAL or self.images_per_sample > 1 or self.captions_per_sample > 1
        ):
            raise ValueError(
                "form=triton is for one caption per image and positives=diagonal; set form=auto for several right ones"
            )
        return self


class PairObjective(base.Objective):
    """An objective that pairs images with captions."""

    batch_coupled = True
    is_reference = True

    def __init__(self, name: str, options: PairOptions, encoder: DualEncoder) -> None:
        """
        Raises:
            UserError: `dims` has more dimensions than the embeddings.
        """
        super().__init__()
        if max(options.dims, default=0) > encoder.embed_dim:
            raise UserError(
                f"objectives.{name}.dims has {max(options.dims)}, but embeddings have model.embed_dim="
                f"{encoder.embed_dim} dimensions; give at most these"
            )
        self.options = options
        self.image = base.IMAGE

    def groups(self) -> tuple[str, ...]:
        return () if self.options.positives == DIAGONAL else (self.options.positives,)

    def images(self) -> int:
        return self.options.images_per_sample

    def captions(self) -> int:
        return self.options.captions_per_sample

    def required_passes(self) -> tuple[base.EncoderPass, ...]:
        return (*self._image_passes().values(), *self._text_passes().values())

    def predict(self, features: base.Features, inputs: base.Inputs, encoder: DualEncoder) -> base.Predictions:
        images = {name: encoder.project_image(features[p].pooled) for name, p in self._image_passes().items()}
        texts = {name: encoder.project_text(features[p].pooled) for name, p in self._text_passes().items()}
        return images | texts | {"logit_scale": encoder.logit_scale}

    def pairs(self, predictions: base.Predictions, inputs: base.Inputs) -> tuple[Tensor, Tensor, Groups | None]:
        """All images [n, D] and captions [m, D], and their groups; None if only the pairs of one row are right.

        The second images follow the first images of all samples.
        """
        options = self.options
        images = torch.cat([predictions[name] for name in self._image_passes()])
        texts = torch.cat([predictions[name] for name in self._text_passes()])
        numbers = [] if options.positives == DIAGONAL else [inputs[f"group.{options.positives}"]]
        if not numbers and options.images_per_sample == options.captions_per_sample == 1:
            return images, texts, None
        own = [inputs["ids"]] if options.same == "mask" or not numbers else []
        rows = torch.stack([*own, *numbers], 1)
        left, right = (rows.repeat(count, 1) for count in (options.images_per_sample, options.captions_per_sample))
        return images, texts, Groups(left, right)

    def prefixes(self, images: Tensor, texts: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Images and captions for each of `dims`, as unit vectors; as they are without `dims`."""
        cut = [[F.normalize(side[:, :dim].float(), dim=-1) for side in (images, texts)] for dim in self.options.dims]
        return [(image, text) for image, text in cut] or [(images, texts)]

    def metrics(
        self, images: Tensor, texts: Tensor, scale: Tensor, world: World, groups: Groups | None
    ) -> dict[str, tuple[Tensor, Tensor | float]]:
        """Accuracy in the batch, with `dims` also that of the fewest dimensions, and the temperature's inverse; with
        groups, the chance loss of this batch."""
        found: dict[str, tuple[Tensor, Tensor | float]] = {"accuracy": matching_accuracy(images, texts, world, groups)}
        if self.options.dims:
            least = min(self.options.dims)
            image, text = (F.normalize(side[:, :least].detach(), dim=-1) for side in (images, texts))
            found[f"accuracy_{least}"] = matching_accuracy(image, text, world, groups)
        if groups is not None:
            found["chance_loss"] = (self.chance_with_groups(*logits.count_candidates(groups, world), world), 1.0)
        return {**found, "logit_scale": (scale.detach(), 1.0)}

    @abc.abstractmethod
    def chance_with_groups(self, of_images: Tensor, of_texts: Tensor, right: Tensor, world: World) -> Tensor:
        """The chance loss where further pairs are right or left out.

        Args:
            of_images: number of captions that the loss compares each of this rank's images with, [n].
            of_texts: number of images for each caption, [m].
            right: number of right captions of each image, [n].
        """

    def _image_passes(self) -> dict[str, base.EncoderPass]:
        further = range(1, self.options.images_per_sample)
        # Patches are hidden at the same places in all images of a sample.
        return {"image": self.image} | {f"image.{i}": replace(self.image, input=f"view.main.{i}") for i in further}

    def _text_passes(self) -> dict[str, base.EncoderPass]:
        further = range(1, self.options.captions_per_sample)
        passes = {f"text.{i}": base.EncoderPass("text", f"tokens.{i}", f"token_mask.{i}") for i in further}
        return {"text": base.TEXT} | passes


def mean(losses: list[Tensor]) -> Tensor:
    """The mean of scalars; a single one as it is."""
    return torch.stack(losses).mean() if len(losses) > 1 else losses[0]


def matching_accuracy(rows: Tensor, columns: Tensor, world: World, groups: Groups | None = None) -> tuple[Tensor, int]:
    """Number of this process's first rows [n, D] that are nearest to their own column [n, D] of the global batch, or to
    one of their group, and the number of rows tested."""
    rows = rows[:ACCURACY_ROWS]
    return logits.correct_matches(rows, columns, world=world, groups=groups).sum(), len(rows)
