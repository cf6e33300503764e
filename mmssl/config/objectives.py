"""`objectives` and `mixer`: what is trained for, and in which balance."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mmssl.config.section import Section


class ObjectiveConfig(BaseModel):
    """When and how strongly one objective acts; its own options stand beside these and are checked by the objective."""

    model_config = ConfigDict(frozen=True, extra="allow", use_attribute_docstrings=True)

    weight: float = Field(1.0, ge=0)
    """Factor of its loss in the total."""
    start: float = Field(0.0, ge=0, le=1)
    """Part of the training after which it acts."""
    end: float = Field(1.0, ge=0, le=1)
    """Part of the training after which it acts no more."""
    ramp: float = Field(0.0, ge=0, le=1)
    """Part of the training over which its weight rises linearly from 0 after `start`."""
    every: int = Field(1, ge=1)
    """It acts on every k-th step only."""


class MixerConfig(Section):
    """How objectives are balanced, and how often it is looked at what they do."""

    balance: Literal["fixed", "uncertainty", "gradient_norm"] = "fixed"
    """`fixed`: the weights as given. Experimental: `uncertainty` (times the inverse of each running loss) and
    `gradient_norm` (each gradient brought to the contrastive one's norm)."""
    watch_steps: int | None = Field(100, ge=1)
    """Measure each objective's gradient norm, its cosine with the contrastive gradient and its share of the time every
    so many steps, on 64 samples. Null: never."""
    picture_steps: int | None = Field(200, ge=1)
    """Write what objectives reconstruct to RUN/pictures every so many steps. Null: never."""

    @model_validator(mode="after")
    def _check(self) -> "MixerConfig":
        if self.balance == "gradient_norm" and self.watch_steps is None:
            raise ValueError("mixer.balance=gradient_norm measures gradients: set mixer.watch_steps, for example 100")
        return self
