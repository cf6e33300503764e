"""What an ablation will run: one cell for each mix and seed, all of equal compute."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mmssl.apps.ablate.mixes import parse_mixes, slug
from mmssl.build import check_schedules, objective_options, resolve
from mmssl.config import Config, load_config, parse_config
from mmssl.errors import UserError
from mmssl.objectives._mix_spec import Mix
from mmssl.train.cost import StepCosts, untrained_task


@dataclass(frozen=True)
class Budget:
    """The compute each cell gets: minutes of training steps, or the operations of the baseline's training."""

    kind: Literal["minutes", "flops"]
    minutes: float | None = None


@dataclass(frozen=True)
class AblationRun:
    """One run: a mix with a seed."""

    mix: str
    seed: int
    name: str
    """Of its folder and files."""
    config: Config

    @property
    def run_dir(self) -> Path:
        """The folder of its run."""
        return self.config.run_dir

    @property
    def record(self) -> Path:
        """The file that is written when it is finished."""
        return self.run_dir / "finished.json"


@dataclass(frozen=True)
class PlannedMix:
    """A mix, what its steps cost, and its runs."""

    mix: Mix
    """With every option written out."""
    costs: StepCosts
    cost: float
    """Operations a sample of an average step."""
    cells: tuple[AblationRun, ...]
    """One a seed."""


@dataclass(frozen=True)
class AblationPlan:
    """All that will be run."""

    config: Config
    """The settings common to all cells."""
    budget: Budget
    seeds: tuple[int, ...]
    mixes: tuple[PlannedMix, ...]
    """The baseline first."""
    out: Path

    @property
    def cells(self) -> list[AblationRun]:
        """Every cell, all mixes of a seed before the next seed, so that a part of an ablation can be read too."""
        return [planned.cells[i] for i in range(len(self.seeds)) for planned in self.mixes]

    def log(self, cell: AblationRun) -> Path:
        """What a cell prints."""
        return self.out / "logs" / f"{cell.name}.log"

    def settings(self, cell: AblationRun) -> Path:
        """The configuration that a cell is started with."""
        return self.out / "configs" / f"{cell.name}.yaml"


def make_plan(
    config: Config, mixes: Sequence[str], seeds: Sequence[int], budget: Budget, out: Path, threads: int | None
) -> AblationPlan:
    """Check everything that can be checked before hours of training, and lay out the cells.

    Args:
        mixes: as written; none means the default ones.
        threads: CPU threads of a cell's math; None: as configured.

    Raises:
        UserError: the mixes, seeds, budget or configuration are no basis for a comparison, or `out` holds runs made
            with other settings.
    """
    parsed = parse_mixes(mixes, config.objectives)
    if len(set(seeds)) < 2:
        raise UserError("an ablation needs at least 2 seeds, for differences have no interval with one: --seeds 3")
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {','.join(map(str, seeds))} names a seed twice; name each once")
    if not config.evaluate.suites:
        raise UserError("evaluate.suites is empty, so the mixes cannot be compared; add a suite to the configuration")
    resolve(config)
    if threads is not None:
        config = config.model_copy(update={"train": config.train.model_copy(update={"threads": threads})})
    baseline: PlannedMix | None = None
    planned = []
    for mix in parsed:
        current = _plan_mix(config, mix, seeds, budget, out, baseline)
        baseline = baseline or current
        planned.append(current)
    plan = AblationPlan(config, budget, tuple(seeds), tuple(planned), out)
    for cell in plan.cells:
        _refuse_other_settings(plan, cell)
    return plan


def steps_for(costs: StepCosts, schedules: Mapping[str, Any], operations: float) -> int:
    """Steps of a training that costs so many operations a sample of the batch, to the nearest step."""
    steps = max(1, round(operations / costs.mean(schedules)))
    # A schedule in parts of the training depends a little on its length.
    for _ in range(4):
        steps = max(1, round(operations / costs.mean(schedules, steps)))
    return steps


def _plan_mix(
    config: Config, mix: Mix, seeds: Sequence[int], budget: Budget, out: Path, baseline: PlannedMix | None
) -> PlannedMix:
    minutes = budget.minutes if budget.kind == "minutes" else None
    # Under a budget of operations the steps are known once their cost is.
    length = {"minutes": minutes, "steps": 1 if minutes is None else None, "epochs": None, "samples": None}
    tree = config.model_dump(mode="json")
    tree["objectives"] = mix.objectives
    tree["train"] |= length
    tree["mixer"] |= _unwatched(config)
    settings = parse_config(tree, where=f"mix {mix.name!r}")
    schedules = objective_options(settings)
    check_schedules(schedules)
    resolved = {name: options.model_dump(mode="json") for name, options in schedules.items()}
    settings = parse_config(tree | {"objectives": resolved}, where=f"mix {mix.name!r}")
    costs = StepCosts(untrained_task(settings, schedules))
    if minutes is not None:
        cost = costs.mean(schedules)
    else:
        steps = _baseline_steps(config)
        if baseline is not None:
            steps = steps_for(costs, schedules, steps * baseline.cost)
        cost = costs.mean(schedules, steps)
        settings = settings.model_copy(update={"train": settings.train.model_copy(update={"steps": steps})})
    cells = []
    for seed in seeds:
        name = f"{slug(mix.name)}-seed{seed}"
        update = {"seed": seed, "run_dir": out / "runs" / name}
        cells.append(AblationRun(mix.name, seed, name, settings.model_copy(update=update)))
    return PlannedMix(replace(mix, objectives=resolved), costs, cost, tuple(cells))


def _unwatched(config: Config) -> dict[str, None]:
    """Watching costs a mix of more objectives more time, so cells are watched only as far as the configuration asks."""
    keys = {"watch_steps", "image_steps"} - config.mixer.model_fields_set
    return dict.fromkeys(sorted(keys))


def _baseline_steps(config: Config) -> int:
    """How long the baseline trains under a budget of operations."""
    train = config.train
    if train.steps is not None:
        return train.steps
    if train.samples is not None:
        return -(-train.samples // config.data.batch_size)
    raise UserError(
        "--budget flops takes the baseline's length from the configuration; give train.steps or train.samples, and set "
        "train.minutes and train.epochs to null"
    )


def _refuse_other_settings(plan: AblationPlan, cell: AblationRun) -> None:
    if not cell.run_dir.exists():
        return
    path = plan.settings(cell)
    if not path.is_file():
        raise UserError(f"{cell.run_dir} exists, but no ablation made it; give another --out")
    before, now = (dict(_flat(c.model_dump(mode="json"))) for c in (load_config(path), cell.config))
    for key in [k for k in {**before, **now} if k != "run_dir"]:
        if before.get(key) != now.get(key):
            raise UserError(
                f"{cell.run_dir} was made with {key}={before.get(key)}, now it is {now.get(key)}; give another "
                f"--out, or the settings of before"
            )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Dotted keys and values of a nested mapping."""
    found = []
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            found += _flat(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", value))
    return found
