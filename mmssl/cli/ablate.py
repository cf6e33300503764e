"""`mmssl ablate`."""

import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mmssl.cli.common import Overrides, make_folder, progress_bar, stdout, verb, writing
from mmssl.errors import StopRequested, UserError

if TYPE_CHECKING:
    from mmssl.apps.ablate import AblationPlan, Budget


@verb(50)
def ablate(
    config: Annotated[str, typer.Argument(help="YAML file whose `objectives` lists all that the mixes choose from.")],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the runs and the report.")] = None,
    mix: Annotated[
        list[str] | None,
        typer.Option(
            help="Objectives joined by '+'; repeat, the baseline first. For example contrastive, contrastive+mlm, "
            "'contrastive+mlm(weight=0.05,every=2)', all. Default: contrastive, contrastive with each other, and all."
        ),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Number of seeds, or a list such as 0,1,5.")] = "3",
    minutes: Annotated[float | None, typer.Option(help="Minutes of training per run. Default: train.minutes.")] = None,
    budget: Annotated[
        Literal["minutes", "flops"],
        typer.Option(
            help="Compute that all runs get: equal minutes, or the FLOPs of the baseline's train.steps or "
            "train.samples."
        ),
    ] = "minutes",
    metric: Annotated[
        list[str] | None,
        typer.Option(help="Metric to compare, or suite/task/metric; repeat. Default: the main one of each suite."),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Runs at a time. Default: one per GPU, or 1 without GPUs.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
) -> None:
    """Measure the gain of each objective at equal compute, with paired seeds.

    Finished runs are kept: repeat the command to resume, and add mixes or seeds to extend the comparison.
    """
    if out is None:
        raise UserError("--out is missing; give the folder for runs and report, for example --out runs/ablation")
    from mmssl import system
    from mmssl.apps.ablate import make_plan, make_slots, run_all, threads_per_run, visible_gpus
    from mmssl.config import load_config

    settings, chosen = load_config(config, overrides or []), _parse_seeds(seeds)
    limit = _budget(budget, minutes, settings.train.minutes)
    slots = make_slots(jobs, visible_gpus(), system.allowed_cores())
    plan = make_plan(settings, mix or [], chosen, limit, out, threads_per_run(slots, settings.train.threads))
    if dry_run:
        _print_plan(plan, len(slots))
        return
    command = _command(config, overrides or [], plan, metric or [], jobs)
    make_folder(out)
    with writing(out, remedy="give another folder"):
        (out / "command.txt").write_text(f"{command}\n", encoding="utf-8")
    try:
        with progress_bar("runs", text="starting") as bar:
            failed = run_all(plan, slots, bar.print, bar.update)
    except KeyboardInterrupt as stopped:
        print(f"stopped; resume with the same command: {command}", file=sys.stderr)
        raise typer.Exit(128 + (stopped.number if isinstance(stopped, StopRequested) else signal.SIGINT)) from None
    _report(plan, command, metric or [], failed)
    if failed:
        print(f"error: {len(failed)} of {len(plan.runs)} runs failed: {', '.join(failed)}", file=sys.stderr)
        raise typer.Exit(1)


def _report(plan: "AblationPlan", command: str, metrics: list[str], failed: dict[str, str]) -> None:
    from rich.table import Column, Table

    from mmssl.apps.ablate import write_report

    result = write_report(plan, command, metrics, failed)
    for header, rows in result.tables():
        table = Table(Column(header[0], no_wrap=True), *(Column(name, overflow="fold") for name in header[1:]))
        for row in rows:
            table.add_row(*row)
        stdout().print(table)
    for sentence in result.sentences():
        stdout().print(sentence, highlight=False, soft_wrap=True)
    print(f"report: {plan.out / 'ablation.md'}, {plan.out / 'ablation.png'}, {plan.out / 'ablation.json'}")


def _print_plan(plan: "AblationPlan", jobs: int) -> None:
    from rich.table import Column, Table

    names = ("objectives", "predicted cost", "length of a run", "finished")
    table = Table(Column("mix", no_wrap=True), *(Column(name, overflow="fold") for name in names))
    for planned in plan.mixes:
        train = planned.runs[0].config.train
        table.add_row(
            planned.mix.name,
            ", ".join(f"{name} {options['weight']:g}" for name, options in planned.mix.objectives.items()),
            f"{planned.cost / plan.mixes[0].cost:.2f} x ({planned.cost / 1e9:.3g} GFLOP per pair)",
            f"{train.minutes:g} minutes" if train.minutes is not None else f"{train.steps:,} steps",
            f"{sum(run.is_finished for run in planned.runs)} of {len(planned.runs)}",
        )
    stdout().print(table)
    left = sum(not run.is_finished for run in plan.runs)
    total = f"{left} runs to go of {len(plan.runs)} ({len(plan.seeds)} seeds), {jobs} at a time"
    if plan.budget.minutes is not None:
        minutes = -(-left // jobs) * plan.budget.minutes
        total += f": {minutes:g} minutes of training, plus the start and the evaluation of {left} runs"
    print(total)


def _parse_seeds(text: str) -> list[int]:
    """Seeds 0, 1, 2 for `3`; seeds 0 and 4 for `0,4`."""
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        numbers = [-1]
    if min(numbers) < 0:
        raise UserError(f"--seeds {text!r} is not a number of seeds, for example 3, or a list such as 0,1,5")
    return numbers if "," in text else list(range(numbers[0]))


def _budget(kind: Literal["minutes", "flops"], minutes: float | None, configured: float | None) -> "Budget":
    from mmssl.apps.ablate import Budget

    if kind == "flops":
        if minutes is not None:
            raise UserError("--minutes and --budget flops exclude each other; leave out one of them")
        return Budget("flops")
    minutes = configured if minutes is None else minutes
    if minutes is None or minutes <= 0:
        raise UserError("the length of a run is missing; give --minutes 5 (more than 0), or --budget flops")
    return Budget("minutes", minutes)


def _command(config: str, overrides: list[str], plan: "AblationPlan", metrics: list[str], jobs: int | None) -> str:
    """The command that repeats this ablation, with its defaults written out."""
    words = ["mmssl", "ablate", config, *overrides, "--out", str(plan.out)]
    for planned in plan.mixes:
        words += ["--mix", planned.mix.name]
    words += ["--seeds", ",".join(map(str, plan.seeds))]
    words += ["--minutes", f"{plan.budget.minutes:g}"] if plan.budget.kind == "minutes" else ["--budget", "flops"]
    for name in metrics:
        words += ["--metric", name]
    return shlex.join([*words, *(["--jobs", str(jobs)] if jobs is not None else [])])
