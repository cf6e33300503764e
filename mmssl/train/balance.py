"""Objectives' weights that follow the training. Experimental: no published comparison shows that they beat tuned fixed
weights for images and text."""

from collections.abc import Iterable, Mapping
from typing import Literal

from mmssl.objectives import reference

MEMORY = 0.99
"""Part of the old running average in the new one."""


class Balance:
    """Factors on the configured weights.

    - `fixed`: 1.
    - `uncertainty`: the inverse of each loss's running average, the closed-form optimum of the learnt variances of
      Kendall et al. 2018 (total = sum of L / v + log v is least at v = L).
    - `gradient_norm`: each loss's gradient on the towers gets the norm that the contrastive (or siglip) one's has on
      average, or the first one's where there is neither.
    """

    def __init__(self, kind: Literal["fixed", "uncertainty", "gradient_norm"], running: dict[str, float]) -> None:
        """`running`: objective -> running average of its loss or gradient norm; kept up to date here."""
        self.kind = kind
        self.running = running

    def factors(self, names: Iterable[str]) -> dict[str, float]:
        """Objective -> factor; 1 for what was not measured yet."""
        if self.kind == "fixed" or not self.running:
            return dict.fromkeys(names, 1.0)
        to = 1.0
        if self.kind == "gradient_norm":
            to = self.running[reference(self.running) or next(iter(self.running))]
        return {name: to / max(self.running[name], 1e-8) if name in self.running else 1.0 for name in names}

    def observe(self, values: Mapping[str, float]) -> None:
        """Take in a step's numbers (`NAME.loss`, now and then `NAME.gradient_norm`), the same on every process."""
        if self.kind == "fixed":
            return
        ending = ".loss" if self.kind == "uncertainty" else ".gradient_norm"
        for key, value in values.items():
            if key.endswith(ending) and value == value:  # not NaN
                name = key.removesuffix(ending)
                before = self.running.get(name, value)
                self.running[name] = MEMORY * before + (1 - MEMORY) * value
