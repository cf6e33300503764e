"""`mmssl ablate`."""

import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    plan_file: Annotated[
        Path | None,
        typer.Option(
            "--plan",
            help="YAML file of mixes instead of --mix, the baseline first: `name: contrastive+mlm`, or with other "
            "settings `name: {mix: contrastive, settings: {data.captions: ['{name}', '{tags}']}}`.",
        ),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Number of seeds, or a list such as 0,1,5.")] = "3",
    minutes: Annotated[float | None, typer.Option(help="Minutes of training per run. Default: train.minutes.")] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Epochs per run, instead of minutes: for data that is seen many times.")
    ] = None,
    flops: Annotated[
        bool,
        typer.Option(
            "--flops", help="Give all runs the operations of the baseline's train.steps or train.samples instead."
        ),
    ] = False,
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

    Finished runs are kept: repeat the command to resume, and add mixes or seeds to extend the comparison. With
    evaluate.every=STEPS the report shows curves, and the best step of each run beside the last.
    """
    if out is None:
        raise UserError("--out is missing; give the folder for runs and report, for example --out runs/ablation")
    from mmssl import system
    from mmssl.apps.ablate import (
        make_plan,
        make_slots,
        read_plan_file,
        request_mixes,
        run_all,
        threads_per_run,
        visible_gpus,
    )
    from mmssl.config import load_config

    settings, chosen = load_config(config, overrides or []), _parse_seeds(seeds)
    if plan_file is not None and mix:
        raise UserError("--plan and --mix exclude each other; add the mix to the plan file")
    mixes = read_plan_file(plan_file) if plan_file is not None else request_mixes(mix or [], settings.objectives)
    limit = _budget(minutes, epochs, flops, settings.train.minutes)
    slots = make_slots(jobs, visible_gpus(), system.allowed_cores())
    plan = make_plan(settings, mixes, chosen, limit, out, threads_per_run(slots, settings.train.threads))
    if dry_run:
        _print_plan(plan, len(slots))
        return
    command = _command(config, overrides or [], plan, plan_file, metric or [], jobs)
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
    from mmssl.apps.report import write_report as write_page

    result = write_report(plan, command, metrics, failed)
    moments = [(moment.title, result.metric_table(moment)) for moment in result.moments]
    for title, (header, rows) in [*moments, ("Cost", result.cost_table())]:
        # A line per value: beside each other they are too narrow to read in a terminal of 80 columns.
        table = Table(Column(header[0], overflow="fold"), Column("", overflow="fold"), Column("", ratio=1), title=title)
        for mix, *values in rows:
            for place, (name, value) in enumerate(zip(header[1:], values, strict=True)):
                table.add_row("" if place else mix, name, value, end_section=place == len(values) - 1)
        stdout().print(table)
    for line in result.sentences():
        stdout().print(line, highlight=False, soft_wrap=True)
    print(f"report: {plan.out / 'ablation.md'}, with its images and {plan.out / 'ablation.json'}")
    finished = [run.run_dir for run in plan.runs if run.is_finished]
    if finished:
        page, _ = write_page(finished, plan.out / "page", images=0)
        print(f"curves of all runs: {page}")


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
            f"{train.steps:,} steps" if plan.budget.kind == "flops" else str(plan.budget),
            f"{sum(run.is_finished for run in planned.runs)} of {len(planned.runs)}",
        )
    stdout().print(table)
    left = sum(not run.is_finished for run in plan.runs)
    total = f"{left} runs to go of {len(plan.runs)} ({len(plan.seeds)} seeds), {jobs} at a time"
    if plan.budget.kind == "minutes" and plan.budget.amount is not None:
        minutes = -(-left // jobs) * plan.budget.amount
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


def _budget(minutes: float | None, epochs: float | None, flops: bool, configured: float | None) -> "Budget":
    from mmssl.apps.ablate import Budget

    given = {"--minutes": minutes is not None, "--epochs": epochs is not None, "--flops": flops}
    chosen = [option for option, is_given in given.items() if is_given]
    if len(chosen) > 1:
        raise UserError(f"{' and '.join(chosen)} exclude each other; leave out all but one")
    if flops:
        return Budget("flops")
    amount = epochs if epochs is not None else configured if minutes is None else minutes
    if amount is None or amount <= 0:
        raise UserError("the length of a run is missing; give --minutes 5 or --epochs 50 (more than 0), or --flops")
    return Budget("minutes" if epochs is None else "epochs", amount)


def _command(
    config: str,
    overrides: list[str],
    plan: "AblationPlan",
    plan_file: Path | None,
    metrics: list[str],
    jobs: int | None,
) -> str:
    """The command that repeats this ablation, with its defaults written out."""
    words = ["mmssl", "ablate", config, *overrides, "--out", str(plan.out)]
    if plan_file is not None:
        words += ["--plan", str(plan_file)]
    else:
        words += [word for planned in plan.mixes for word in ("--mix", planned.mix.name)]
    words += ["--seeds", ",".join(map(str, plan.seeds))]
    words += ["--flops"] if plan.budget.kind == "flops" else [f"--{plan.budget.kind}", f"{plan.budget.amount:g}"]
    for name in metrics:
        words += ["--metric", name]
    return shlex.join([*words, *(["--jobs", str(jobs)] if jobs is not None else [])])
