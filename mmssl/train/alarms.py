"""Signs of trouble in a run's numbers, said in words, each once."""

import math
from collections.abc import Mapping

from mmssl.objectives import reference

EARLY = 0.1
"""Before this part of the training, a loss near its start is nothing to worry about."""
EARLY_STEPS = 20
"""Nor is it before so many steps."""
STUCK = 0.97
"""A loss between pictures and captions above this part of guessing's is not better than guessing."""
COLLAPSED = 2.0
"""An effective rank of the picture features below this means that all pictures get nearly the same vector."""


class Alarms:
    """Looks at every step's record."""

    def __init__(self, batch_size: int, max_logit_scale: float, said: list[str]) -> None:
        """`said`: the kinds said already; kept up to date here."""
        self.batch_size = batch_size
        self.max_logit_scale = max_logit_scale
        self.said = said

    def look(self, record: Mapping[str, float | int | str], progress: float) -> list[str]:
        """What is new to say about a step after the part `progress` of the training."""
        new = {kind: text for kind, text in self._signs(record, progress).items() if kind not in self.said}
        self.said.extend(new)
        return list(new.values())

    def _signs(self, record: Mapping[str, float | int | str], progress: float) -> dict[str, str]:
        def value(name: str) -> float:
            return float(record.get(name, math.nan))

        signs = {}
        step = record["step"]
        pairing = reference({key.removesuffix(".loss") for key in record if key.endswith(".loss")})
        guessed = guessing_loss(pairing, self.batch_size) if pairing is not None else 0.0
        late = progress > EARLY and value("step") > EARLY_STEPS
        if late and value(f"{pairing}.loss") > STUCK * guessed > 0:
            signs["stuck"] = (
                f"step {step}: the {pairing} loss {value(f'{pairing}.loss'):.2f} is no better than that of guessing, "
                f"{guessed:.2f}; do captions belong to their pictures (mmssl shards show)? Else try a lower optim.lr "
                f"or a longer optim.warmup"
            )
        if progress < 0.5 and value(f"{pairing}.logit_scale") > 0.999 * self.max_logit_scale:
            signs["clamp"] = (
                f"step {step}: the temperature reached its clamp (model.max_logit_scale={self.max_logit_scale:g}) in "
                f"the first half of the training; a lower optim.lr or more data may help"
            )
        if value("image_effective_rank") < COLLAPSED:
            signs["collapsed"] = (
                f"step {step}: the picture features collapsed (effective rank {value('image_effective_rank'):.1f}): "
                f"all pictures get nearly the same vector; lower optim.lr, or the weights of the other objectives"
            )
        if "mlm.loss" in record and math.isnan(value("mlm.loss")):
            signs["targets"] = f"step {step}: no caption had a token to mask for mlm; are the captions empty?"
        return signs


def guessing_loss(objective: str, batch_size: int) -> float:
    """The least loss of a model that gives every picture and caption of a batch of N the same logit.

    InfoNCE then has ln N, whatever the logit. SigLIP has -ln p - (N - 1) ln(1 - p) a picture, least at p = 1 / N.
    """
    n = batch_size
    return math.log(n) + ((n - 1) * math.log(n / (n - 1)) if objective == "siglip" and n > 1 else 0.0)
