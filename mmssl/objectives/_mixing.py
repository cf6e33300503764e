"""The training task: the objectives of a step, their weights, and one forward pass that serves all of them."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from mmssl.config import ObjectiveConfig, ViewConfig
from mmssl.distributed import World
from mmssl.errors import UserError
from mmssl.models import DualEncoder, Encoded, batch_norm
from mmssl.objectives._base import IMAGE, EncoderPass, Inputs, Objective, Output, Predictions, Resized
from mmssl.objectives._registry import find_objective
from mmssl.rng import RowRandom
from mmssl.types import Batch

Cached = dict[str, Predictions]
"""Objective name -> gradient of the weighted total with respect to its predictions for the samples at hand."""


def weight_at(schedule: ObjectiveConfig, step: int, progress: float) -> float:
    """Weight of an objective at `step`, at the fraction `progress` of the training (0 to 1)."""
    if step % schedule.every or not schedule.start <= progress <= schedule.end:
        return 0.0
    if schedule.ramp == 0 or progress >= schedule.start + schedule.ramp:
        return schedule.weight
    return schedule.weight * (progress - schedule.start) / schedule.ramp


def first_gap(schedules: Iterable[ObjectiveConfig]) -> float | None:
    """The first fraction of the training at which a step may have no active objective; None if there is none."""
    schedules = list(schedules)
    # The set of active objectives changes at these points only.
    changes = sorted({0.0, 1.0, *(s.start for s in schedules), *(s.end for s in schedules)})
    points = sorted([*changes, *((a + b) / 2 for a, b in pairwise(changes))])
    # At step 1 only objectives with every=1 are active.
    return next((p for p in points if not any(weight_at(s, 1, p) > 0 for s in schedules)), None)


def encoder_passes(objectives: Iterable[Objective]) -> tuple[EncoderPass, ...]:
    """The distinct encodings these objectives need, in order of first need."""
    return tuple(dict.fromkeys(forward for objective in objectives for forward in objective.required_passes()))


def further_views(objectives: Iterable[Objective]) -> list[str]:
    """Names of the views that show further images of a sample: `main.1`, ..."""
    return [f"main.{number}" for number in range(1, max((o.images() for o in objectives), default=1))]


def caption_count(objectives: Iterable[Objective]) -> int:
    """Number of captions of each sample that these objectives need."""
    return max((objective.captions() for objective in objectives), default=1)


def find_reference(names: Iterable[str]) -> str | None:
    """The objective among these that pairs images with captions; the others are compared with it."""
    return next((name for name in sorted(names) if find_objective(name).is_reference), None)


@dataclass(frozen=True)
class Weighted:
    """Weight and scale of one objective in a step."""

    weight: float
    """From the schedule."""
    scale: Tensor
    """World size over the number of loss terms in the global batch: the average over ranks becomes the mean."""


class TrainingTask(nn.Module):
    """The dual encoder and its objectives as one module, with one forward per backward pass, as DDP requires."""

    def __init__(self, encoder: DualEncoder, objectives: Mapping[str, Objective], world: World) -> None:
        super().__init__()
        self.encoder = encoder
        self.names = list(objectives)
        # torch forbids dots in names of modules, and dotted paths have them.
        self.objectives = nn.ModuleDict({name.replace(".", "/"): module for name, module in objectives.items()})
        self.world = world

    def on_data(self, samples: Callable[[], int]) -> None:
        """Tell objectives that keep values of every sample the number of samples.

        Raises:
            UserError: the number is unknown.
        """
        for name in self.names:
            objective = self.objective(name)
            if not objective.keeps_samples:
                continue
            try:
                count = samples()
            except UserError:
                raise UserError(
                    f"objectives.{name} keeps values of every sample, and shards without an index do not number their "
                    f"samples; run `mmssl shards index` first"
                ) from None
            objective.on_data(count)

    @torch.no_grad()
    def inputs(
        self, batch: Batch, active: Iterable[str], random: Callable[[str], RowRandom], progress: float
    ) -> dict[str, Tensor]:
        """A batch with the targets of the active objectives, at the fraction `progress` of the training (0 to 1).

        `random` gives each objective its own random numbers, which are the same in any mix.
        """
        inputs = {f"view.{name}": view for name, view in batch.views.items()}
        inputs |= {"tokens": batch.tokens, "token_mask": batch.token_mask, "ids": batch.ids}
        inputs |= {f"group.{name}": numbers for name, numbers in batch.groups.items()}
        inputs |= batch.more_tokens | batch.extras
        for name in active:
            objective = self.objective(name)
            objective.on_step_start(progress)
            inputs |= objective.sample_targets(inputs, random(name), self.encoder)
        return inputs

    @torch.no_grad()
    def on_step_end(self, inputs: Inputs, active: Iterable[str]) -> None:
        """Let the active objectives update their own state, such as a queue, from the batch of a step."""
        for name in active:
            self.objective(name).on_step_end(inputs, self.world)

    def objective(self, name: str) -> Objective:
        """One objective by name."""
        objective = self.objectives[name.replace(".", "/")]
        assert isinstance(objective, Objective)
        return objective

    def required_views(self) -> dict[str, ViewConfig | Resized]:
        """Views that the objectives need in addition to `main`, by name.

        Raises:
            UserError: two objectives share a view and ask for different ones.
        """
        found: dict[str, ViewConfig | Resized] = {}
        for name in self.names:
            for view, asked in self.objective(name).views().items():
                if found.setdefault(view, asked) != asked:
                    raise UserError(
                        f"objectives.{name}.view differs from that of another objective which shares the view {view}; "
                        f"give both the same, or set data.views.{view} and leave objectives.{name}.view out"
                    )
        return found

    def predict(self, inputs: Inputs, active: Iterable[str]) -> dict[str, Predictions]:
        """Run the encoder passes of the active objectives, and their predictions.

        Batch-coupled objectives come first, so that their dropout does not depend on the other objectives.
        """
        features: dict[EncoderPass, Encoded] = {}
        predictions = {}
        # Batch norms evaluate with the statistics of whole, unchanged images, where a step has some.
        has_plain = IMAGE in encoder_passes(self.objective(name) for name in active)
        for name in sorted(active, key=lambda name: not self.objective(name).batch_coupled):
            objective = self.objective(name)
            for forward in objective.required_passes():
                if forward not in features:
                    changed = has_plain and forward.tower == "vision" and forward != IMAGE
                    with batch_norm.uncounted(self.encoder.vision) if changed else nullcontext():
                        features[forward] = self._encode(forward, inputs)
            predictions[name] = objective.predict(features, inputs, self.encoder)
        return predictions

    def losses(
        self, predictions: Mapping[str, Predictions], inputs: Inputs, active: Mapping[str, Weighted]
    ) -> tuple[Tensor, dict[str, Output]]:
        """The weighted total of some objectives, and each one's own output."""
        outputs = {name: self.objective(name).loss(predictions[name], inputs, self.world) for name in active}
        parts = [active[name].weight * active[name].scale * output.total for name, output in outputs.items()]
        return torch.stack(parts).sum(), outputs

    def forward(
        self,
        inputs: Inputs,
        active: Mapping[str, Weighted],
        cached: Cached | None = None,
        only_predict: bool = False,
    ) -> tuple[Tensor, dict[str, Output]] | dict[str, Predictions]:
        """The scalar to back-propagate for these samples, and each objective's output.

        `cached` holds gradients of losses over the complete batch with respect to these samples' predictions. For
        these objectives, the inner product with the gradients replaces the loss (GradCache, Gao et al. 2021).
        With `only_predict`, only the predictions are returned.
        """
        cached = cached or {}
        predictions = self.predict(inputs, active)
        if only_predict:
            return predictions
        direct = {name: weighted for name, weighted in active.items() if name not in cached}
        total = torch.zeros((), device=inputs["ids"].device)
        outputs: dict[str, Output] = {}
        if direct:
            total, outputs = self.losses(predictions, inputs, direct)
        for name, gradients in cached.items():
            for key, gradient in gradients.items():
                total = total + (predictions[name][key].float() * gradient).sum()
        return total, outputs

    def _encode(self, forward: EncoderPass, inputs: Inputs) -> Encoded:
        tower: nn.Module = self.encoder.vision if forward.tower == "vision" else self.encoder.text
        x, mask = inputs[forward.input], inputs[forward.mask] if forward.mask else None
        # A locked tower needs no graph.
        with torch.set_grad_enabled(torch.is_grad_enabled() and any(p.requires_grad for p in tower.parameters())):
            encoded = tower(x, mask)
        assert isinstance(encoded, Encoded)
        return encoded
