"""The report of an ablation: ablation.json, ablation.md and its images, and its tables for the terminal."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mmssl.apps.ablate.moments import Metric, Moment, find_moments
from mmssl.apps.ablate.plan import AblationPlan
from mmssl.apps.ablate.results import (
    MixComparison,
    Results,
    RunCost,
    choose_metrics,
    format_change,
    format_interval,
    format_value,
    read_runs,
    sentence,
)
from mmssl.files import write_json

Table = tuple[list[str], list[list[str]]]
"""Header and rows."""
_COST_HEADER = ["mix", "minutes", "steps", "samples seen", "samples/s", "GFLOP per sample", "PFLOP", "peak memory"]
_COST_NOTE = (
    "Means over the finished seeds; memory is the largest of a run's process (and of its GPU). Minutes are those of "
    "training steps. Operations are those of matrix products, convolutions and attention, counted on a step with "
    "captions of 16 tokens, not measured in the runs."
)


@dataclass(frozen=True)
class AblationResult:
    """The content of a report."""

    command: str
    plan: AblationPlan
    metrics: Sequence[Metric]
    """Those of the comparisons."""
    moments: Sequence[Moment]
    """The end of the runs first."""
    failed: Mapping[str, str]
    """Run -> reason."""

    @property
    def mixes(self) -> list[str]:
        """Names, the baseline first."""
        return [planned.mix.name for planned in self.plan.mixes]

    @property
    def results(self) -> Results:
        """The finished runs at their end."""
        return self.moments[0].results

    def costs(self, mix: str) -> list[RunCost]:
        """One per finished seed."""
        return [run.cost for run in self.results[mix].values()]

    def metric_table(self, moment: Moment) -> Table:
        """The metrics of each mix at a moment; with the mean step if that is not the last."""
        with_step = moment is not self.moments[0]
        header = ["mix", *(["step"] if with_step else []), *(f"{suite} {metric}" for suite, metric in self.metrics)]
        found = {(c.mix, c.suite, c.metric): c for c in moment.comparisons}
        rows = []
        for mix in self.mixes:
            steps = moment.steps(mix)
            place = [f"{statistics.fmean(steps):,.0f}" if steps else ""] if with_step else []
            entries = (_entry(moment.results, mix, *m, found.get((mix, *m))) for m in self.metrics)
            rows.append([mix, *place, *entries])
        return header, rows

    def sentences(self) -> list[str]:
        """One sentence per comparison, of the best steps where the runs were evaluated during the training."""
        return [sentence(comparison) for comparison in self.main_moment.comparisons]

    @property
    def main_moment(self) -> Moment:
        """The best steps if they are known, else the end."""
        return self.moments[min(1, len(self.moments) - 1)]

    def cost_table(self) -> Table:
        """What the runs of each mix used."""
        return _COST_HEADER, [[mix, *_cost_row(self.costs(mix))] for mix in self.mixes]


def write_report(plan: AblationPlan, command: str, metrics: Sequence[str], failed: Mapping[str, str]) -> AblationResult:
    """Compare the finished runs of a plan, and write the report.

    Args:
        command: the command that repeats the ablation.
        metrics: as the user requests them; empty: the main metric of each suite.
        failed: run -> reason.

    Raises:
        UserError: no suite has a requested metric.
    """
    from mmssl.apps.ablate.plots import draw_curves, draw_differences

    results = read_runs(plan)
    chosen = choose_metrics(metrics, results)
    names = [planned.mix.name for planned in plan.mixes]
    best = plan.config.best_metric
    chosen_by = choose_metrics([best] if best else [], results)[:1]
    moments = find_moments(results, chosen, names, *chosen_by)
    result = AblationResult(command, plan, chosen, moments, failed)
    write_json(plan.out / "ablation.json", as_json(result))
    (plan.out / "ablation.md").write_text(as_markdown(result), encoding="utf-8")
    draw_differences(plan.out / "ablation.png", result.main_moment.comparisons, names[0])
    if len(moments) > 1:
        draw_curves(plan.out / "curves.png", results, chosen)
    return result


def as_json(result: AblationResult) -> dict[str, Any]:
    """Everything as plain values."""
    return {
        "command": result.command,
        "budget": asdict(result.plan.budget),
        "seeds": list(result.plan.seeds),
        "baseline": result.mixes[0],
        "mixes": {
            planned.mix.name: {
                "objectives": planned.mix.objectives,
                "operations_per_sample": planned.cost,
                "runs": {
                    str(seed): {
                        "run_dir": str(run.run.run_dir),
                        "spent": asdict(run.cost)
                        | {
                            "samples_per_second": run.cost.samples_per_second,
                            "operations_per_sample": run.cost.operations_per_sample,
                        },
                        "results": run.results,
                        "evaluations": [asdict(evaluation) for evaluation in run.evaluations],
                    }
                    for seed, run in result.results[planned.mix.name].items()
                },
            }
            for planned in result.plan.mixes
        },
        "moments": [
            {
                "title": moment.title,
                "steps": {mix: moment.steps(mix) for mix in result.mixes},
                "comparisons": [asdict(c) | {"sentence": sentence(c)} for c in moment.comparisons],
            }
            for moment in result.moments
        ],
        "failed": dict(result.failed),
    }


def as_markdown(result: AblationResult) -> str:
    """Tables, sentences and the command; shows the images, which are in the same folder."""
    lines = ["# Ablation", "", "```bash", result.command, "```", "", _setting(result), ""]
    lines += ["![Difference of each mix to the baseline](ablation.png)", ""]
    if len(result.moments) > 1:
        lines += ["![Metrics during the training](curves.png)", ""]
    for moment in result.moments:
        lines += _moment_section(result, moment)
    lines += ["## Cost", "", *_markdown_table(result.cost_table()), "", _COST_NOTE]
    if result.failed:
        lines += ["", "## Failed", "", *(f"- {name}: {reason}" for name, reason in result.failed.items())]
    return "\n".join([*lines, ""])


def _moment_section(result: AblationResult, moment: Moment) -> list[str]:
    lines = [f"## {moment.title}", "", moment.note, "", *_markdown_table(result.metric_table(moment)), ""]
    if moment.comparisons:
        lines += [f"Differences to {result.mixes[0]}, paired by seed:", ""]
        lines += [f"- {sentence(c)}{' (*)' if c.holds_after_holm else ''}" for c in moment.comparisons]
        lines += ["", _caution(moment.comparisons), ""]
    return lines


def _setting(result: AblationResult) -> str:
    plan = result.plan
    seeds = f"{len(plan.seeds)} seeds ({', '.join(map(str, plan.seeds))})"
    budget = {
        "minutes": f"{plan.budget} of training steps",
        "epochs": f"{plan.budget} (each sample is seen {plan.budget.amount:g} times)",
        "flops": "an equal number of floating-point operations",
    }[plan.budget.kind]
    costs = [cost for mix in result.mixes for cost in result.costs(mix)]
    places = sorted({f"{c.device} ({c.threads} CPU thread{'s' if c.threads > 1 else ''})" for c in costs})
    where = f" on {', '.join(places)}" if places else ""
    mixes = [f"`{p.mix.name}` is {_contents(p.mix.objectives)}" for p in plan.mixes]
    return (
        f"Each mix ran with {seeds}, each run with {budget}{where}. Runs with the same seed start from the same "
        f"weights and see the samples in the same order. Weights: {'; '.join(mixes)}."
    )


def _contents(objectives: Mapping[str, Mapping[str, Any]]) -> str:
    return " + ".join(f"{options['weight']:g} {name}" for name, options in objectives.items())


def _entry(results: Results, mix: str, suite: str, metric: str, comparison: MixComparison | None) -> str:
    """The mean of a metric, with its difference to the baseline."""
    values = [float(run.results[suite][metric]) for run in results[mix].values()]
    if not values:
        return "no finished run"
    mean = format_value(metric, statistics.fmean(values))
    if comparison is None or comparison.paired is None:
        return mean
    change, interval = comparison.paired.mean, comparison.paired.interval
    before = statistics.fmean(comparison.baseline)
    factor = f"x {(before + change) / before:.2f}, " if before > 0 else ""
    found = f"{factor}{format_change(metric, change)}, {format_interval(metric, interval)}"
    return f"{mean} ({found}) {comparison.verdict}"


def _cost_row(costs: Sequence[RunCost]) -> list[str]:
    if not costs:
        return [""] * (len(_COST_HEADER) - 1)
    memory = f"{max(cost.peak_memory_bytes for cost in costs) / 2**20:,.0f} MiB"
    gpu = [cost.peak_gpu_memory_bytes for cost in costs if cost.peak_gpu_memory_bytes is not None]
    return [
        f"{statistics.fmean(cost.minutes for cost in costs):.2f}",
        f"{statistics.fmean(cost.steps for cost in costs):,.0f}",
        f"{statistics.fmean(cost.samples for cost in costs):,.0f}",
        f"{statistics.fmean(cost.samples_per_second for cost in costs):,.0f}",
        f"{statistics.fmean(cost.operations_per_sample for cost in costs) / 1e9:.3g}",
        f"{statistics.fmean(cost.operations for cost in costs) / 1e15:.3g}",
        memory + (f", GPU {max(gpu) / 2**20:,.0f} MiB" if gpu else ""),
    ]


def _caution(comparisons: Sequence[MixComparison]) -> str:
    count = sum(c.paired is not None for c in comparisons)
    return (
        f"A difference is reported only if neither its interval over seeds nor its interval over samples contains 0. "
        f"Each of the {count} comparisons has a chance of about 5 % of a false alarm; (*) marks differences over seeds "
        f"that remain significant after correction for all comparisons (Holm). Fewer seeds give wider intervals: "
        f"'no difference' does not prove that there is none."
    )


def _markdown_table(table: Table) -> list[str]:
    header, rows = table
    return [
        f"| {' | '.join(header)} |",
        f"|{' --- |' * len(header)}",
        *(f"| {' | '.join(entry.replace('|', '/') for entry in row)} |" for row in rows),
    ]
