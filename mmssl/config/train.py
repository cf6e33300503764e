"""`optim`, `train`, `objectives` and `mixer`: optimizer, training loop, objectives and their diagnostics."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mmssl.config.base import ConfigBase


class OptimConfig(ConfigBase):
    """The optimizer and the learning-rate schedule. The defaults are OpenCLIP's."""

    lr: float = Field(5e-4, gt=0)
    """Peak learning rate."""
    vision_lr: float | None = Field(None, gt=0)
    """Peak learning rate of the vision tower. Default: `lr`."""
    text_lr: float | None = Field(None, gt=0)
    """Peak learning rate of the text tower. Default: `lr`."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's betas."""
    eps: float = Field(1e-6, gt=0)
    """AdamW's epsilon."""
    weight_decay: float = Field(0.2, ge=0)
    """Decoupled weight decay; none on biases, norms, embeddings of position and class, and the temperature."""
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    """Schedule after the warm-up. `cosine`: to `final_lr`. `wsd`: constant, then a linear decay (warm-up, stable,
    decay)."""
    warmup: float = Field(0.05, ge=0)
    """Linear warm-up: a fraction of the training below 1, else a number of steps."""
    decay: float = Field(0.2, gt=0, le=1)
    """Length of wsd's decay, as a fraction of the training."""
    final_lr: float = Field(0.0, ge=0, le=1)
    """Learning rate at the end, relative to the peak."""
    clip_norm: float | None = Field(None, gt=0)
    """Largest norm of the gradient over all weights."""


@dataclass(frozen=True)
class Length:
    """Length of a run: a number of steps, or of minutes spent in training steps (without evaluation and saving)."""

    steps: int | None
    minutes: float | None

    def fraction(self, step: int, seconds: float) -> float:
        """Fraction of the run that is done, 0 to 1, after `step` steps that took `seconds`."""
        if self.steps is not None:
            return min(step / self.steps, 1.0)
        assert self.minutes is not None
        return min(seconds / (60 * self.minutes), 1.0)


class EarlyStoppingConfig(ConfigBase):
    """The end of a run whose held-out metric no longer improves. The model is then that of the best step."""

    metric: str | None = None
    """The metric, for example `held_out/retrieval/image_retrieval_recall@5`. Default: `evaluate.best`."""
    patience: int = Field(5, ge=1)
    """Evaluations in a row without an improvement before the run ends."""
    min_delta: float = Field(0.0, ge=0)
    """Smallest change of the metric that counts as an improvement."""


class GuardConfig(ConfigBase):
    """A suite on which the training must not make the model worse: of what it could do before, for example. It is also
    evaluated before the first step."""

    suite: str
    """Name of the suite in `evaluate.suites`."""
    metric: str | None = None
    """TASK/METRIC of the suite, for example `zero_shot/acc1`. Default: the main metric of its first task."""
    drop: float | None = Field(None, ge=0, lt=1)
    """Largest loss, as a fraction of the value before the first step: 0.05 allows a fall from 60 % to 57 %."""
    floor: float | None = None
    """Lowest value allowed (highest, where lower is better), in place of `drop`."""
    action: Literal["stop", "lower_rate"] = "stop"
    """Consequence of a value below the floor. `stop`: the run ends, and its model is that of the best step above the
    floor. `lower_rate`: the learning rate is multiplied by `factor` from then on."""
    factor: float = Field(0.5, gt=0, lt=1)
    """Factor of `lower_rate`, at each evaluation below the floor."""

    @model_validator(mode="after")
    def _check(self) -> "GuardConfig":
        if (self.drop is None) == (self.floor is None):
            raise ValueError("train.guard needs one of drop, for example 0.05, and floor")
        return self


class TrainConfig(ConfigBase):
    """Length, precision and safety of the training loop."""

    steps: int | None = Field(None, ge=1)
    """Length in optimizer steps."""
    epochs: float | None = Field(None, gt=0)
    """Length in epochs."""
    samples: int | None = Field(None, ge=1)
    """Length in samples seen."""
    minutes: float | None = Field(None, gt=0)
    """Length in minutes of wall clock; the schedule follows the clock."""
    expected_minutes: float | None = Field(None, gt=0)
    """Minutes that a recipe's training takes on the hardware it names; a run that will take over three times as long
    says why."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format of the forward pass. `auto`: bf16 where the device multiplies it faster than fp32 (measured at the
    start), else fp16 on GPUs and fp32 on CPUs; the choice is written to the run's configuration."""
    micro_batch: Annotated[int, Field(ge=1)] | Literal["auto"] | None = None
    """Pairs per process whose activations are held at a time; the gradient stays that of the whole batch. `auto`: as
    many as fit into the free memory. Default: all."""
    exchange: Literal["gather", "ring"] = "gather"
    """Exchange of features between processes. `gather` gives every process all features. `ring` passes them round in
    parts, for batches whose features would fill a device."""
    compile: bool = False
    """Compile both towers with torch.compile; captions of any length share one program."""
    ema: float | None = Field(None, gt=0, lt=1)
    """Decay of an exponential moving average of the weights, which is then evaluated and exported. Null: none."""
    checkpoint_steps: int | None = Field(None, ge=1)
    """Steps between checkpoints."""
    checkpoint_minutes: float | None = Field(15.0, gt=0)
    """Minutes between checkpoints."""
    keep: int = Field(2, ge=1)
    """Number of checkpoints to keep, besides the best one."""
    sync_batch_norm: bool = True
    """Batch norms use the statistics of the global batch."""
    activation_checkpointing: bool = False
    """Recompute activations of the towers in the backward pass."""
    threads: int | None = Field(None, ge=1)
    """CPU threads of torch. Default: torch's own choice."""
    trackers: list[str] = ["tensorboard"]
    """Accelerate trackers to log to, besides metrics.jsonl."""
    log_samples: bool = False
    """Write the sample ids of every step's global batch to sample_ids.jsonl."""
    nonfinite_limit: int = Field(5, ge=1)
    """Consecutive updates skipped for a non-finite loss or gradient before the run stops; with fp16, 16 more."""
    early_stopping: EarlyStoppingConfig | None = None
    """End the run when a held-out metric no longer improves, and export the best step. Null: never."""
    guard: GuardConfig | None = None
    """Stop the run or lower its learning rate when it forgets what a suite measures. Null: never."""

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        given = [k for k in ("steps", "epochs", "samples", "minutes") if getattr(self, k) is not None]
        if len(given) != 1:
            found = f"found {' and '.join(given)}" if given else "found none"
            raise ValueError(
                f"train needs exactly one of steps, epochs, samples and minutes ({found}); set the others to null"
            )
        return self

    def length(self, batch_size: int, samples_per_epoch: Callable[[], int]) -> Length:
        """Length of the run; a partial batch counts as a step.

        Args:
            samples_per_epoch: asked only for a length in epochs, since shards without an index cannot tell.
        """
        if self.minutes is not None:
            return Length(None, self.minutes)
        if self.steps is not None:
            return Length(self.steps, None)
        samples = self.samples if self.samples is not None else (self.epochs or 0) * samples_per_epoch()
        return Length(max(1, math.ceil(samples / batch_size)), None)


class ObjectiveConfig(BaseModel):
    """Weight and schedule of one objective. Its own options are further keys, which the objective checks."""

    model_config = ConfigDict(frozen=True, extra="allow", use_attribute_docstrings=True)

    weight: float = Field(1.0, ge=0)
    """Factor of the loss in the total loss."""
    start: float = Field(0.0, ge=0, le=1)
    """Fraction of the training at which the objective becomes active."""
    end: float = Field(1.0, ge=0, le=1)
    """Fraction of the training at which the objective ends."""
    ramp: float = Field(0.0, ge=0, le=1)
    """Fraction of the training over which the weight rises linearly from 0, after `start`."""
    every: int = Field(1, ge=1)
    """Steps from one active step to the next; 1: every step."""


class MixerConfig(ConfigBase):
    """Intervals of the objectives' diagnostics."""

    watch_steps: int | None = Field(100, ge=1)
    """Steps between measurements of each objective's gradient norm, its cosine with the contrastive gradient and its
    fraction of the time, on 64 samples. Null: never."""
    image_steps: int | None = Field(200, ge=1)
    """Steps between images of the objectives' reconstructions in RUN/images. Null: never."""
