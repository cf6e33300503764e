"""Signs of trouble in a run's numbers, said in words, each once."""

import math
from collections.abc import Mapping

EARLY = 0.1
"""Before this part of the training, a loss near its start is nothing to worry about."""
STUCK = 0.97
"""A contrastive loss above this part of ln(batch) is not better than guessing."""
COLLAPSED = 2.0
"""An effective rank of the picture features below this means that all pictures get nearly the same vector."""


class Alarms:
    """Looks at every step's record."""

    def __init__(self, batch_size: int, max_logit_scale: float, said: list[str]) -> None:
        """`said`: the kinds said already; kept up to date here."""
        self.chance = math.log(batch_size)
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
        if progress > EARLY and value("contrastive.loss") > STUCK * self.chance > 0:
            signs["stuck"] = (
                f"step {step}: the contrastive loss {value('contrastive.loss'):.2f} is still near ln(batch) = "
                f"{self.chance:.2f}, that of guessing; do captions belong to their pictures (mmssl shards show)? "
                f"Else try a lower optim.lr or a longer optim.warmup"
            )
        if progress < 0.5 and value("contrastive.logit_scale") > 0.999 * self.max_logit_scale:
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
