"""`mmssl ablate`: the verb."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Column, Table

from mmssl import system
from mmssl.config import load_config
from mmssl.errors import UserError

if TYPE_CHECKING:
    from mmssl.apps.ablate.plan import AblationPlan, Budget


def ablate(
    config: Annotated[str, typer.Argument(help="A YAML file whose `objectives` lists all that the mixes choose from.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the configuration."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the runs and the report.")] = None,
    mix: Annotated[
        list[str] | None,
        typer.Option(
            help="Objectives joined by '+', the baseline first, for example contrastive, contrastive+mlm, "
            "'contrastive+mlm(weight=0.05,every=2)', all. Default: contrastive alone, with each other one, and all."
        ),
    ] = None,
    seeds: Annotated[str, typer.Option(help="How many, or a list such as 0,1,5.")] = "3",
    minutes: Annotated[float | None, typer.Option(help="Minutes of training a run. Default: train.minutes.")] = None,
    budget: Annotated[
        str,
        typer.Option(help="What is equal for all runs: minutes, or flops (of the baseline's train.steps or samples)."),
    ] = "minutes",
    metric: Annotated[
        list[str] | None,
        typer.Option(help="A figure to compare, or suite/task/figure. Default: each suite's main one."),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Runs at a time. Default: as many as there are GPUs, else 1.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
) -> None:
    """Measure what each objective buys at equal compute, with paired seeds.

    Runs that are finished are kept, so the same command goes on where it was stopped, and more mixes or seeds may be
    added later.
    """
    if out is None:
        raise UserError("give the folder for runs and report, for example --out runs/ablation")
    from mmssl.apps.ablate.plan import make_plan
    from mmssl.apps.ablate.scheduler import make_slots, run_all, threads_per_run, visible_gpus

    settings, chosen = load_config(config, overrides or []), _seeds(seeds)
    limit = _budget(budget, minutes, settings.train.minutes)
    slots = make_slots(jobs, visible_gpus(), system.allowed_cores())
    plan = make_plan(settings, mix or [], chosen, limit, out, threads_per_run(slots, settings.train.threads))
    if dry_run:
        _print_plan(plan, len(slots))
        return
    command = _command(config, overrides or [], plan, metric or [], jobs)
    _write_command(out, command)
    try:
        failed = run_all(plan, slots, Console(stderr=True))
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on: {command}", file=sys.stderr)
        raise typer.Exit(130) from None
    _report(plan, command, metric or [], failed)
    if failed:
        print(f"error: {len(failed)} of {len(plan.cells)} runs failed: {', '.join(failed)}", file=sys.stderr)
        raise typer.Exit(1)


def _write_command(out: Path, command: str) -> None:
    """Keep the command beside the runs; a folder that cannot be written is refused before hours of work."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "command.txt").write_text(f"{command}\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}; pick another folder") from None


def _report(plan: "AblationPlan", command: str, metrics: list[str], failed: dict[str, str]) -> None:
    from mmssl.apps.ablate.plots import draw
    from mmssl.apps.ablate.report import AblationResult, as_json, as_markdown, as_tables
    from mmssl.apps.ablate.results import choose_metrics, read_runs
    from mmssl.apps.ablate.verdict import compare_mixes, sentence
    from mmssl.files import write_json

    cells = read_runs(plan)
    figures = choose_metrics(metrics, plan, cells)
    names = [planned.mix.name for planned in plan.mixes]
    result = AblationResult(command, plan, cells, figures, compare_mixes(cells, figures, names), failed)
    write_json(plan.out / "ablation.json", as_json(result))
    (plan.out / "ablation.md").write_text(as_markdown(result), encoding="utf-8")
    draw(plan.out / "ablation.png", result.comparisons, names[0])
    console = Console()
    for table in as_tables(result):
        console.print(table)
    for comparison in result.comparisons:
        console.print(sentence(comparison), highlight=False, soft_wrap=True)
    print(f"report: {plan.out / 'ablation.md'}, {plan.out / 'ablation.png'}, {plan.out / 'ablation.json'}")


def _print_plan(plan: "AblationPlan", jobs: int) -> None:
    table = Table(Column("mix", no_wrap=True), "objectives", "predicted cost", "length of a run", "finished")
    for planned in plan.mixes:
        train = planned.cells[0].config.train
        table.add_row(
            planned.mix.name,
            ", ".join(f"{name} {options['weight']:g}" for name, options in planned.mix.objectives.items()),
            f"{planned.cost / plan.mixes[0].cost:.2f} x ({planned.cost / 1e9:.3g} GFLOP a pair)",
            f"{train.minutes:g} minutes" if train.minutes is not None else f"{train.steps:,} steps",
            f"{sum(cell.record.is_file() for cell in planned.cells)} of {len(planned.cells)}",
        )
    Console().print(table)
    left = sum(not cell.record.is_file() for cell in plan.cells)
    total = f"{left} runs to go of {len(plan.cells)} ({len(plan.seeds)} seeds), {jobs} at a time"
    if plan.budget.minutes is not None:
        minutes = -(-left // jobs) * plan.budget.minutes
        total += f": {minutes:g} minutes of training, and what starting and evaluating {left} runs takes"
    print(total)


def _seeds(text: str) -> list[int]:
    """`3` means 0, 1, 2; `0,4` means these."""
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        numbers = [-1]
    if min(numbers) < 0:
        raise UserError(f"--seeds {text!r}: give how many, for example 3, or a list such as 0,1,5")
    return numbers if "," in text else list(range(numbers[0]))


def _budget(kind: str, minutes: float | None, configured: float | None) -> "Budget":
    from mmssl.apps.ablate.plan import Budget

    kinds: dict[str, Literal["minutes", "flops"]] = {"minutes": "minutes", "flops": "flops"}
    if kind not in kinds:
        raise UserError(f"--budget {kind!r} is unknown; give minutes or flops")
    if kind == "flops":
        if minutes is not None:
            raise UserError("--minutes and --budget flops exclude each other; leave one of them out")
        return Budget("flops")
    minutes = configured if minutes is None else minutes
    if minutes is None or minutes <= 0:
        raise UserError("how long may a run train? give --minutes 5 (more than 0), or --budget flops")
    return Budget("minutes", minutes)


def _command(config: str, overrides: list[str], plan: "AblationPlan", metrics: list[str], jobs: int | None) -> str:
    """The command that makes this report, with what was left to defaults written out."""
    words = ["mmssl", "ablate", config, *overrides, "--out", str(plan.out)]
    for planned in plan.mixes:
        words += ["--mix", planned.mix.name]
    words += ["--seeds", ",".join(map(str, plan.seeds))]
    words += ["--minutes", f"{plan.budget.minutes:g}"] if plan.budget.kind == "minutes" else ["--budget", "flops"]
    for name in metrics:
        words += ["--metric", name]
    return shlex.join([*words, *(["--jobs", str(jobs)] if jobs is not None else [])])
