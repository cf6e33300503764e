"""The ablation's result as JSON, Markdown and a table for the terminal."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Column, Table

from mmssl.apps.ablate.plan import AblationPlan
from mmssl.apps.ablate.results import MixResults, Spent
from mmssl.apps.ablate.verdict import MixComparison, sentence, show_change, show_interval, show_value


@dataclass(frozen=True)
class AblationResult:
    """Everything a report says."""

    command: str
    plan: AblationPlan
    cells: Mapping[str, Mapping[int, MixResults]]
    """Mix -> seed -> run."""
    figures: Sequence[tuple[str, str]]
    """`suite/task` and figure of each comparison."""
    comparisons: Sequence[MixComparison]
    failed: Mapping[str, str]
    """Cell -> why."""

    @property
    def mixes(self) -> list[str]:
        """Names, the baseline first."""
        return [planned.mix.name for planned in self.plan.mixes]

    def values(self, mix: str, suite: str, figure: str) -> list[float]:
        """One a finished seed."""
        return [float(m.results[suite][figure]) for m in self.cells[mix].values()]

    def spent(self, mix: str) -> list[Spent]:
        """One a finished seed."""
        return [m.spent for m in self.cells[mix].values()]


def as_json(result: AblationResult) -> dict[str, Any]:
    """Plain values only."""
    budget = asdict(result.plan.budget)
    return {
        "command": result.command,
        "budget": budget,
        "seeds": list(result.plan.seeds),
        "baseline": result.mixes[0],
        "mixes": {
            planned.mix.name: {
                "objectives": planned.mix.objectives,
                "operations_per_sample": planned.cost,
                "runs": {
                    str(seed): {
                        "run_dir": str(m.cell.run_dir),
                        "spent": asdict(m.spent)
                        | {
                            "samples_per_second": m.spent.samples_per_second,
                            "operations_per_sample": m.spent.operations_per_sample,
                        },
                        "results": m.results,
                    }
                    for seed, m in result.cells[planned.mix.name].items()
                },
            }
            for planned in result.plan.mixes
        },
        "comparisons": [asdict(c) | {"sentence": sentence(c)} for c in result.comparisons],
        "failed": dict(result.failed),
    }


def as_markdown(result: AblationResult) -> str:
    """Tables, sentences and the exact command; shows ablation.png, which lies beside it."""
    lines = ["# Ablation", "", "```bash", result.command, "```", "", _setting(result), ""]
    lines += ["![Difference of each mix to the baseline](ablation.png)", "", "## Results", ""]
    lines += _markdown_table(["mix", *(f"{suite} {figure}" for suite, figure in result.figures)], _result_rows(result))
    if result.comparisons:
        lines += ["", f"Differences to {result.mixes[0]}, paired by seed:", ""]
        lines += [f"- {sentence(c)}{' (*)' if c.holds_after_holm else ''}" for c in result.comparisons]
        lines += ["", _caution(result.comparisons)]
    lines += ["", "## Cost", ""]
    lines += _markdown_table(_COST_HEADER, _cost_rows(result))
    lines += ["", _COST_NOTE]
    if result.failed:
        lines += ["", "## Failed", "", *(f"- {name}: {why}" for name, why in result.failed.items())]
    return "\n".join([*lines, ""])


def as_tables(result: AblationResult) -> list[Table]:
    """The results and the cost, for a terminal."""
    results = Table(Column("mix", no_wrap=True), *(f"{suite} {figure}" for suite, figure in result.figures))
    for row in _result_rows(result):
        results.add_row(*row)
    costs = Table(Column("mix", no_wrap=True), *_COST_HEADER[1:])
    for row in _cost_rows(result):
        costs.add_row(*row)
    return [results, costs]


_COST_HEADER = ["mix", "minutes", "steps", "samples seen", "samples/s", "GFLOP a sample", "PFLOP", "peak memory"]
_COST_NOTE = (
    "Means over the finished seeds; memory is the largest of a run's process (and of its GPU). Minutes are those of "
    "training steps. Operations are those of matrix products, convolutions and attention, counted on a step with "
    "captions of 16 tokens, not measured in the runs."
)


def _setting(result: AblationResult) -> str:
    plan, spent = result.plan, [s for mix in result.mixes for s in result.spent(mix)]
    seeds = f"{len(plan.seeds)} seeds ({', '.join(map(str, plan.seeds))})"
    budget = (
        f"{plan.budget.minutes:g} minutes of training steps"
        if plan.budget.kind == "minutes"
        else "an equal number of floating-point operations"
    )
    places = sorted({f"{s.device} ({s.threads} CPU thread{'s' if s.threads > 1 else ''})" for s in spent})
    mixes = [f"`{p.mix.name}` is {_contents(p.mix.objectives)}" for p in plan.mixes]
    where = f" on {', '.join(places)}" if places else ""
    return (
        f"Each mix ran with {seeds}, each run with {budget}{where}. A seed means the same weights to begin with and "
        f"the same order of samples in every mix. Weights: {'; '.join(mixes)}."
    )


def _contents(objectives: Mapping[str, Mapping[str, Any]]) -> str:
    return " + ".join(f"{options['weight']:g} {name}" for name, options in objectives.items())


def _result_rows(result: AblationResult) -> list[list[str]]:
    found = {(c.mix, c.suite, c.figure): c for c in result.comparisons}
    return [
        [mix, *(_cell(result, mix, suite, figure, found.get((mix, suite, figure))) for suite, figure in result.figures)]
        for mix in result.mixes
    ]


def _cell(result: AblationResult, mix: str, suite: str, figure: str, comparison: MixComparison | None) -> str:
    values = result.values(mix, suite, figure)
    if not values:
        return "no finished run"
    mean = show_value(figure, statistics.fmean(values))
    if comparison is None or comparison.paired is None:
        return mean
    paired = comparison.paired
    return f"{mean} ({show_change(figure, paired.mean)}, {show_interval(figure, paired.interval)}) {comparison.verdict}"


def _cost_rows(result: AblationResult) -> list[list[str]]:
    rows = []
    for mix in result.mixes:
        spent = result.spent(mix)
        if not spent:
            rows.append([mix, *("",) * (len(_COST_HEADER) - 1)])
            continue
        mean = {
            key: statistics.fmean(getattr(s, key) for s in spent)
            for key in ("minutes", "steps", "samples", "samples_per_second", "operations_per_sample", "operations")
        }
        memory = f"{max(s.peak_memory_bytes for s in spent) / 2**20:,.0f} MiB"
        gpu = [s.peak_gpu_memory_bytes for s in spent if s.peak_gpu_memory_bytes is not None]
        rows.append(
            [
                mix,
                f"{mean['minutes']:.2f}",
                f"{mean['steps']:,.0f}",
                f"{mean['samples']:,.0f}",
                f"{mean['samples_per_second']:,.0f}",
                f"{mean['operations_per_sample'] / 1e9:.3g}",
                f"{mean['operations'] / 1e15:.3g}",
                memory + (f", GPU {max(gpu) / 2**20:,.0f} MiB" if gpu else ""),
            ]
        )
    return rows


def _caution(comparisons: Sequence[MixComparison]) -> str:
    count = sum(c.paired is not None for c in comparisons)
    return (
        f"A difference is called one where neither the interval over seeds nor that over samples holds 0. Of {count} "
        f"comparisons each has a chance of about 5 % to look like a difference where there is none; (*) marks those "
        f"over seeds that stay when all are counted (Holm). Fewer seeds mean wider intervals: no difference shown is "
        f"not the same as no difference."
    )


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(header)} |",
        f"|{' --- |' * len(header)}",
        *(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows),
    ]
