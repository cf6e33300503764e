"""Distillation from a trained model (CLIP-KD, Yang et al. 2023, arXiv:2307.12732)."""

from collections.abc import Mapping

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmssl.distributed import World
from mmssl.errors import UserError
from mmssl.losses import distillation
from mmssl.models import DualEncoder, heads
from mmssl.objectives import _teachers as teachers
from mmssl.objectives import base
from mmssl.rng import RowRandom

AGREEMENT_ROWS = 512
"""Images for the agreement with the teacher: its cost is negligible next to the loss."""


class DistillOptions(base.ObjectiveOptions):
    """Options of distillation; the weights of its losses are relative to each other."""

    teacher: str = ""
    """A run or model folder, any other name that `mmssl eval` takes, or a folder that `mmssl embed --with-text` wrote
    from the training shards: then no teacher runs in training. Of images or captions alone: `timm:MODEL`,
    `timm:MODEL/WEIGHTS` (a tag or a file), `text:NAME` (an encoder of transformers, a folder or a hub name)."""
    captions: str | None = None
    """Template of the captions that the teacher reads, such as `{english}`. Default: the student's captions."""
    features: float = Field(1.0, ge=0)
    """Weight of the squared distance to the teacher's embeddings, after a learnt projection if dimensions differ."""
    logits: float = Field(1.0, ge=0)
    """Weight of the divergence between the teacher's and the student's matches of images and captions."""
    interaction: float = Field(0.0, ge=0)
    """Weight of matching student's images with the teacher's captions and student's captions with its images."""
    relations: float = Field(0.0, ge=0)
    """Weight of the squared difference of the similarities among images, and among captions."""

    @model_validator(mode="after")
    def _check(self) -> "DistillOptions":
        if not self.features + self.logits + self.interaction + self.relations:
            raise ValueError("objectives.distill: all of its losses have weight 0; set features or logits to 1")
        return self


class Distill(base.Objective):
    """Bring embeddings, and similarities within the global batch, near those of a frozen teacher.

    The teacher sees the crop and the augmentations of the main view at its own size, and the captions in its own
    tokens. Checkpoints hold its fingerprint, not its weights.
    """

    Options = DistillOptions
    batch_coupled = True
    has_own_encoder = True

    def __init__(self, options: DistillOptions, encoder: DualEncoder, vocabulary: base.Vocabulary) -> None:
        super().__init__()
        self.options = options
        self.teacher = _open(options)
        projects = self.teacher.dim != encoder.embed_dim and options.features + options.interaction > 0
        kinds = _kinds(self.teacher) if projects else ()
        self.projections = nn.ModuleDict(
            {kind: nn.Linear(encoder.embed_dim, self.teacher.dim, bias=False) for kind in kinds}
        )
        self.register_buffer("fingerprint", torch.tensor(list(self.teacher.fingerprint), dtype=torch.uint8))

    def views(self) -> Mapping[str, base.Resized]:
        return self.teacher.views()

    def sample_inputs(self) -> base.SampleInputs | None:
        return self.teacher.sample_inputs()

    def on_resume(self) -> None:
        if bytes(self.get_buffer("fingerprint").tolist()) != self.teacher.fingerprint:
            raise UserError(
                f"objectives.distill.teacher={self.options.teacher} is not the teacher that this run began with; "
                f"restore that one, or start a new run"
            )

    def sample_targets(self, inputs: base.Inputs, random: RowRandom, encoder: DualEncoder) -> dict[str, Tensor]:
        return self.teacher.embed(inputs)

    def required_passes(self) -> tuple[base.EncoderPass, ...]:
        passes = {"image": base.IMAGE, "text": base.TEXT}
        return tuple(passes[kind] for kind in _kinds(self.teacher))

    def predict(self, features: base.Features, inputs: base.Inputs, encoder: DualEncoder) -> base.Predictions:
        predictions = {}
        if self.teacher.has_image:
            predictions["image"] = encoder.project_image(features[base.IMAGE].pooled)
        if self.teacher.has_text:
            predictions["text"] = encoder.project_text(features[base.TEXT].pooled)
        if self.options.logits + self.options.interaction > 0:
            predictions["logit_scale"] = encoder.logit_scale
        projected = {f"{k}_features": heads.unit(layer(predictions[k])) for k, layer in self.projections.items()}
        return predictions | projected

    def loss(self, predictions: base.Predictions, inputs: base.Inputs, world: World) -> base.Output:
        options, names = self.options, {"image": teachers.IMAGE, "text": teachers.TEXT}
        pairs = [(kind, inputs[name]) for kind, name in names.items() if kind in predictions]
        total, metrics = next(iter(predictions.values())).new_zeros(()), {}
        if len(pairs) == 2:
            metrics["agreement"] = _agreement(predictions, inputs, world)
        for kind, target in pairs:
            mapped = predictions.get(f"{kind}_features", predictions[kind])
            if options.features > 0:
                total = total + options.features / len(pairs) * distillation.features(mapped, target, world=world)
                metrics[f"{kind}_cosine"] = ((mapped.detach() * target).sum(), float(len(target)))
            if options.relations > 0:
                alike = distillation.relations(predictions[kind], target, world=world)
                total = total + options.relations / len(pairs) * alike
        if options.logits + options.interaction > 0:
            total = total + self._matching(predictions, inputs, world)
        return base.Output(total, metrics)

    def _matching(self, predictions: base.Predictions, inputs: base.Inputs, world: World) -> Tensor:
        """The losses over matches of images and captions."""
        scale, total = predictions["logit_scale"], predictions["logit_scale"].new_zeros(())
        theirs = inputs[teachers.IMAGE], inputs[teachers.TEXT]
        if self.options.logits > 0:
            assert self.teacher.logit_scale is not None
            own_scale = torch.full_like(scale, self.teacher.logit_scale)
            ours = predictions["image"], predictions["text"]
            loss = distillation.similarities(*ours, *theirs, scale, own_scale, world=world)
            total = total + self.options.logits * loss
        if self.options.interaction > 0:
            image, text = (predictions.get(f"{kind}_features", predictions[kind]) for kind in ("image", "text"))
            loss = distillation.interaction(image, text, *theirs, scale, world=world)
            total = total + self.options.interaction * loss
        return total


def _kinds(teacher: teachers.Teacher) -> tuple[str, ...]:
    """What a teacher embeds: `image`, `text`, or both."""
    return tuple(kind for kind, has in (("image", teacher.has_image), ("text", teacher.has_text)) if has)


def _open(options: DistillOptions) -> teachers.Teacher:
    """The teacher of a configuration, if it has what the losses need."""
    if not options.teacher:
        raise UserError(
            "objectives.distill.teacher is missing; give a model folder, or a folder that mmssl embed --with-text wrote"
        )
    try:
        teacher = teachers.open_teacher(options.teacher, options.captions)
    except UserError as error:
        raise UserError(f"objectives.distill.teacher: {error}") from None
    if options.captions is not None and not teacher.has_text:
        raise UserError(
            f"objectives.distill.captions={options.captions!r}: the teacher {options.teacher} reads no captions"
        )
    if isinstance(teacher, (teachers.VisionTeacher, teachers.TextTeacher)) and options.logits + options.interaction > 0:
        raise UserError(
            f"objectives.distill.teacher={options.teacher} embeds {_kinds(teacher)[0]}s alone, so it has no matches of "
            f"images and captions; set objectives.distill.logits=0 and interaction=0, and keep features or relations"
        )
    if options.logits + options.interaction > 0 and (not teacher.has_text or teacher.logit_scale is None):
        raise UserError(
            f"objectives.distill.teacher={options.teacher} has no embeddings of captions; embed again with --with-text "
            f"into another folder, or set objectives.distill.logits=0 and interaction=0"
        )
    return teacher


@torch.no_grad()
def _agreement(predictions: base.Predictions, inputs: base.Inputs, world: World) -> tuple[Tensor, float]:
    """Number of this process's first images with the same nearest caption as the teacher finds, and of images."""
    nearest = []
    for image, text in (
        (predictions["image"], predictions["text"]),
        (inputs[teachers.IMAGE], inputs[teachers.TEXT]),
    ):
        columns, _ = world.gather(text.detach())
        nearest.append((image[:AGREEMENT_ROWS] @ columns.T).argmax(1))
    return (nearest[0] == nearest[1]).sum(), float(len(nearest[0]))
