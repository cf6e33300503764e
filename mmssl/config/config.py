"""The complete run configuration."""

from pathlib import Path

from pydantic import Field, model_validator

from mmssl.config.base import ConfigBase
from mmssl.config.data import DataConfig
from mmssl.config.evaluate import EvaluateConfig
from mmssl.config.model import ModelConfig
from mmssl.config.train import MixerConfig, ObjectiveConfig, OptimConfig, TrainConfig


class Config(ConfigBase):
    """The complete configuration of a run."""

    run_dir: Path
    """Folder the run writes; it must not exist unless resumed."""
    seed: int = Field(0, ge=0)
    """The same seed gives the same run."""
    data: DataConfig
    """Training data, views and loading."""
    model: ModelConfig
    """The dual encoder."""
    objectives: dict[str, ObjectiveConfig] = {"contrastive": ObjectiveConfig()}
    """Objective name -> weight, schedule and options of the objective."""
    mixer: MixerConfig = MixerConfig()
    """Diagnostics of the objectives."""
    optim: OptimConfig = OptimConfig()
    """Optimizer and schedule."""
    train: TrainConfig
    """Length, precision, safety."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Evaluation."""

    @model_validator(mode="after")
    def _check(self) -> "Config":
        if self.optim.warmup >= 1 and self.train.minutes is not None:
            raise ValueError("optim.warmup counts steps, but train.minutes measures the run; give a fraction below 1")
        if all(objective.weight == 0 for objective in self.objectives.values()):
            raise ValueError("objectives: none has a weight above 0; set one, for example contrastive: {weight: 1}")
        return self
