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
        self._check_evaluations()
        return self

    def _check_evaluations(self) -> None:
        """Refuse decisions from evaluations that the run does not have."""
        stopping, guard, best = self.train.early_stopping, self.train.guard, self.evaluate.best
        for name, section in (("early_stopping", stopping), ("guard", guard)):
            if section is not None and (not self.evaluate.suites or self.evaluate.every is None):
                missing = "evaluate.suites" if not self.evaluate.suites else "evaluate.every"
                raise ValueError(
                    f"train.{name} needs evaluations during the training, but {missing} is not set; name held-out "
                    f"data in evaluate.suites and the steps between evaluations in evaluate.every"
                )
        if guard is not None and guard.suite not in self.evaluate.suites:
            raise ValueError(
                f"train.guard.suite={guard.suite!r} is none of evaluate.suites: {', '.join(self.evaluate.suites)}"
            )
        if stopping is not None and stopping.metric is not None and best not in (None, stopping.metric):
            raise ValueError(
                f"train.early_stopping.metric={stopping.metric} and evaluate.best={best} name different metrics; a "
                f"run has one best step: leave one of them out"
            )

    @property
    def best_metric(self) -> str | None:
        """`SUITE/TASK/METRIC` that picks the best step; None: the main metric of the first suite."""
        stopping = self.train.early_stopping
        return self.evaluate.best or (stopping.metric if stopping is not None else None)
