"""What finished cells left: figures, outcomes of single samples, and what the training took."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmssl.apps.ablate.plan import AblationPlan, AblationRun, PlannedMix
from mmssl.config import Length
from mmssl.errors import UserError
from mmssl.evaluate.compare import Outcomes, read_outcomes
from mmssl.evaluate.results import MAIN_METRICS, Metrics


@dataclass(frozen=True)
class Spent:
    """What one run took."""

    minutes: float
    """Spent in training steps."""
    steps: int
    samples: int
    """Seen in training, repetitions included."""
    operations: float
    """Floating-point operations of the training, from the counted cost of a step."""
    peak_memory_bytes: int
    peak_gpu_memory_bytes: int | None
    device: str
    threads: int

    @property
    def samples_per_second(self) -> float:
        """Speed in training steps."""
        return self.samples / (60 * self.minutes)

    @property
    def operations_per_sample(self) -> float:
        """Mean over the steps done."""
        return self.operations / self.samples


@dataclass(frozen=True)
class MixResults:
    """A finished run."""

    cell: AblationRun
    results: dict[str, Metrics]
    """`suite/task` -> figures."""
    outcomes: dict[str, Outcomes]
    """`suite/task` -> what was kept of each sample."""
    spent: Spent


def read_runs(plan: AblationPlan) -> dict[str, dict[int, MixResults]]:
    """Mix -> seed -> the run, for the cells that are finished."""
    return {
        planned.mix.name: {cell.seed: _read(planned, cell) for cell in planned.cells if cell.record.is_file()}
        for planned in plan.mixes
    }


def choose_metrics(
    asked: Sequence[str], plan: AblationPlan, cells: dict[str, dict[int, MixResults]]
) -> list[tuple[str, str]]:
    """Pairs of `suite/task` and figure to compare: those asked for, or each suite's main one.

    Args:
        asked: a figure's name, for all suites that have it, or `suite/task/figure`.

    Raises:
        UserError: no suite has such a figure.
    """
    measured = next((m for seeds in cells.values() for m in seeds.values()), None)
    if measured is None:
        return []
    known = {suite: _metrics(metrics) for suite, metrics in measured.results.items()}
    if not asked:
        return [(suite, next((m for m in MAIN_METRICS if m in names), names[0])) for suite, names in known.items()]
    chosen: dict[tuple[str, str], None] = {}
    for name in asked:
        found = [(suite, f) for suite, names in known.items() for f in names if name in (f, f"{suite}/{f}")]
        if not found:
            there = "; ".join(f"{suite}: {', '.join(names)}" for suite, names in known.items())
            raise UserError(f"--metric {name!r} is not measured; there are {there}")
        chosen |= dict.fromkeys(found)
    return list(chosen)


def _metrics(metrics: Metrics) -> list[str]:
    return [name for name, value in metrics.items() if isinstance(value, float)]


def _read(planned: PlannedMix, cell: AblationRun) -> MixResults:
    results = json.loads((cell.run_dir / "results.json").read_text(encoding="utf-8"))
    steps: list[dict[str, Any]] = [
        json.loads(line) for line in (cell.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    batch = cell.config.data.batch_size
    length = Length(cell.config.train.steps, cell.config.train.minutes)
    operations, seconds = 0.0, 0.0
    for i, step in enumerate(steps):
        # A step's record has a loss for each objective that acted.
        acted = [name for name in planned.mix.objectives if f"{name}.loss" in step]
        operations += batch * planned.costs.of(acted, length.fraction(i, seconds))
        seconds = step["seconds"]
    spent = Spent(
        minutes=seconds / 60,
        steps=len(steps),
        samples=len(steps) * batch,
        operations=operations,
        **json.loads(cell.record.read_text(encoding="utf-8")),
    )
    return MixResults(cell, results, read_outcomes(cell.run_dir), spent)
