"""How long a run lasts, and how much of it is done."""

import math
from dataclasses import dataclass

from mmssl.config import TrainConfig


@dataclass(frozen=True)
class Length:
    """A number of steps, or of minutes spent in training steps (evaluating and saving not counted)."""

    steps: int | None
    minutes: float | None

    def progress(self, step: int, seconds: float) -> float:
        """The part done, 0 to 1, after `step` steps that took `seconds`."""
        if self.steps is not None:
            return min(step / self.steps, 1.0)
        assert self.minutes is not None
        return min(seconds / (60 * self.minutes), 1.0)


def training_length(config: TrainConfig, batch_size: int, samples_per_epoch: int) -> Length:
    """The length a configuration asks for; a part of a batch counts as a step."""
    if config.minutes is not None:
        return Length(None, config.minutes)
    if config.steps is not None:
        return Length(config.steps, None)
    samples = config.samples if config.samples is not None else (config.epochs or 0) * samples_per_epoch
    return Length(max(1, math.ceil(samples / batch_size)), None)
