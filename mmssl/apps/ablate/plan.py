"""The plan of an ablation: its mixes of objectives, and one run for each mix and seed, all of equal compute."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmssl.apps.ablate.mixes import MixRequest, check_names, slug
from mmssl.build import check_schedules, objective_options, resolve
from mmssl.config import Config, load_config, parse_config, set_key
from mmssl.errors import UserError
from mmssl.objectives import mix_spec
from mmssl.train import StepCosts, untrained_task


@dataclass(frozen=True)
class Budget:
    """What all runs get equally: minutes of training steps, epochs, or the operations that the baseline needs."""

    kind: Literal["minutes", "epochs", "flops"]
    amount: float | None = None
    """Minutes or epochs."""

    def __str__(self) -> str:
        return "equal operations" if self.amount is None else f"{self.amount:g} {self.kind}"


@dataclass(frozen=True)
class AblationRun:
    """One run: a mix of objectives with a seed."""

    mix: str
    seed: int
    name: str
    """Name of its folder and files."""
    config: Config

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        return self.config.run_dir

    @property
    def record(self) -> Path:
        """The file that marks the run as finished."""
        return self.run_dir / "finished.json"

    @property
    def is_finished(self) -> bool:
        """True once the run has trained and evaluated."""
        return self.record.is_file()


@dataclass(frozen=True)
class PlannedMix:
    """A mix of objectives, the cost of its steps, and its runs."""

    mix: mix_spec.Mix
    """The mix with every option written out."""
    costs: StepCosts
    cost: float
    """Operations per sample, averaged over the steps."""
    runs: tuple[AblationRun, ...]
    """One run per seed."""


@dataclass(frozen=True)
class AblationPlan:
    """All runs of an ablation."""

    config: Config
    """Settings common to all runs."""
    budget: Budget
    seeds: tuple[int, ...]
    mixes: tuple[PlannedMix, ...]
    """The baseline first."""
    out: Path

    @property
    def runs(self) -> list[AblationRun]:
        """Every run. All mixes of a seed come before the next seed, so that an interrupted ablation can be read."""
        return [planned.runs[i] for i in range(len(self.seeds)) for planned in self.mixes]

    def log(self, run: AblationRun) -> Path:
        """The file with the output of a run."""
        return self.out / "logs" / f"{run.name}.log"

    def settings(self, run: AblationRun) -> Path:
        """The configuration file of a run."""
        return self.out / "configs" / f"{run.name}.yaml"


def make_plan(
    config: Config, mixes: Sequence[MixRequest], seeds: Sequence[int], budget: Budget, out: Path, threads: int | None
) -> AblationPlan:
    """Plan the runs, and check everything that can be checked before hours of training.

    Args:
        mixes: the baseline first.
        threads: CPU threads of each run's math; None: as configured.

    Raises:
        UserError: the mixes, seeds, budget or configuration do not allow a comparison, or `out` holds runs with other
            settings.
    """
    check_names(mixes)
    if len(set(seeds)) < 2:
        raise UserError(
            "an ablation needs at least 2 seeds to give differences an interval; give for example --seeds 3"
        )
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {','.join(map(str, seeds))} repeats a seed; give each once")
    if not config.evaluate.suites:
        raise UserError("evaluate.suites is empty, but mixes are compared on suites; add a suite to the configuration")
    resolve(config)
    if threads is not None:
        config = config.model_copy(update={"train": config.train.model_copy(update={"threads": threads})})
    baseline: PlannedMix | None = None
    planned = []
    for mix in mixes:
        current = _plan_mix(config, mix, seeds, budget, out, baseline)
        baseline = baseline or current
        planned.append(current)
    plan = AblationPlan(config, budget, tuple(seeds), tuple(planned), out)
    for run in plan.runs:
        _refuse_other_settings(plan, run)
    return plan


def steps_for(costs: StepCosts, schedules: Mapping[str, Any], operations: float) -> int:
    """The number of steps that cost the given operations per sample of the batch, rounded."""
    steps = max(1, round(operations / costs.mean(schedules)))
    # Schedules are fractions of the training, so the mean cost depends a little on the number of steps.
    for _ in range(4):
        steps = max(1, round(operations / costs.mean(schedules, steps)))
    return steps


def _plan_mix(
    config: Config, request: MixRequest, seeds: Sequence[int], budget: Budget, out: Path, baseline: PlannedMix | None
) -> PlannedMix:
    where = f"mix {request.name!r}"
    tree = _with_settings(config, request)
    objectives = mix_spec.parse_mix(request.objectives, parse_config(tree, where).objectives).objectives
    # Under a budget of operations the number of steps follows from their cost, below.
    length: dict[str, float | None] = dict.fromkeys(("minutes", "steps", "epochs", "samples"))
    length |= {"steps": 1} if budget.kind == "flops" else {budget.kind: budget.amount}
    tree["objectives"] = objectives
    tree["train"] |= length
    tree["mixer"] |= _diagnostics_off(config)
    settings = parse_config(tree, where)
    schedules = objective_options(settings)
    check_schedules(schedules)
    resolved = {name: options.model_dump(mode="json") for name, options in schedules.items()}
    settings = parse_config(tree | {"objectives": resolved}, where)
    if request.settings:
        resolve(settings)
    costs = StepCosts(untrained_task(settings, schedules))
    if budget.kind != "flops":
        cost = costs.mean(schedules)
    else:
        steps = _baseline_steps(config)
        if baseline is not None:
            steps = steps_for(costs, schedules, steps * baseline.cost)
        cost = costs.mean(schedules, steps)
        settings = settings.model_copy(update={"train": settings.train.model_copy(update={"steps": steps})})
    runs = []
    for seed in seeds:
        name = f"{slug(request.name)}-seed{seed}"
        update = {"seed": seed, "run_dir": out / "runs" / name}
        runs.append(AblationRun(request.name, seed, name, settings.model_copy(update=update)))
    return PlannedMix(mix_spec.Mix(request.name, resolved), costs, cost, tuple(runs))


def _with_settings(config: Config, request: MixRequest) -> dict[str, Any]:
    """The configuration as a tree, with the settings of a mix. Options of objectives that are not set stay so."""
    tree = config.model_dump(mode="json")
    tree["objectives"] = {
        name: entry.model_dump(mode="json", exclude_unset=True) for name, entry in config.objectives.items()
    }
    for key, value in request.settings.items():
        set_key(tree, key, value)
    return tree


def _diagnostics_off(config: Config) -> dict[str, None]:
    """Diagnostics take more time with more objectives, so they run only if the configuration sets their interval."""
    keys = {"watch_steps", "image_steps"} - config.mixer.model_fields_set
    return dict.fromkeys(sorted(keys))


def _baseline_steps(config: Config) -> int:
    """The number of baseline steps that defines a budget of operations."""
    train = config.train
    if train.steps is not None:
        return train.steps
    if train.samples is not None:
        return -(-train.samples // config.data.batch_size)
    raise UserError(
        "--flops takes the baseline's length from the configuration; give train.steps or train.samples, and set "
        "train.minutes and train.epochs to null"
    )


def _refuse_other_settings(plan: AblationPlan, run: AblationRun) -> None:
    if not run.run_dir.exists():
        return
    path = plan.settings(run)
    if not path.is_file():
        raise UserError(f"{run.run_dir} was not made by an ablation; give another --out")
    before, now = (dict(_flat(c.model_dump(mode="json"))) for c in (load_config(path), run.config))
    for key in [k for k in {**before, **now} if k != "run_dir"]:
        if before.get(key) != now.get(key):
            raise UserError(
                f"{run.run_dir} was made with {key}={before.get(key)}, now it is {now.get(key)}; give another "
                f"--out, or the earlier settings"
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
