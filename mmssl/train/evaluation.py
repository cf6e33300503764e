"""Evaluation in and after training."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from mmssl.build import RunPlan
from mmssl.distributed import World
from mmssl.errors import UserError, one_line
from mmssl.evaluate import Metrics
from mmssl.files import atomic_write, read_json_lines, set_lines_aside
from mmssl.inference import Model
from mmssl.train.held_out import HeldOut
from mmssl.train.state import RunState


@dataclass(frozen=True)
class RunEvaluator:
    """Evaluates models on the suites of a run."""

    plan: RunPlan
    accelerator: Accelerator
    world: World
    run: RunState
    held_out: HeldOut
    say: Callable[[str], None]
    """Says a line to the user, on process 0."""

    def evaluate(self, model: Model, out: Path | None) -> dict[str, Metrics]:
        """Measure the model of this step, decide from its metrics, and record them in evaluations.jsonl.

        An evaluation that fails is said and recorded, and has no metrics: it never ends a training.

        Args:
            out: folder for tables and plots.

        Returns: `suite/task` -> metrics, the same on every process; the processes share the work.
        """
        results, failed = self.measure(model, out, self.run.step)
        if not self.plan.suites:
            return results
        best = self.held_out.follow(results)
        if self.world.rank == 0:
            record = {"step": self.run.step, "seconds": self.run.seconds, "results": results, "best": best}
            record |= {"failed": failed} if failed else {}
            for line in _append(self.plan.config.run_dir / "evaluations.jsonl", record):
                self.say(f"warning: {line}")
            numbers = {
                f"eval/{n}/{k}": v for n, m in results.items() for k, v in m.items() if isinstance(v, (int, float))
            }
            self.accelerator.log(numbers, step=self.run.step)
        return results

    def measure(self, model: Model, out: Path | None, step: int) -> tuple[dict[str, Metrics], dict[str, str]]:
        """The metrics of the model of a step, and the evaluations that failed with the reason, which is said."""
        if not self.plan.suites:
            return {}, {}
        from mmssl.evaluate import suite  # a run without evaluation does not load the tasks

        config = self.plan.config
        failed: dict[str, str] = {}
        results = suite.run(
            model,
            self.plan.suites,
            out,
            suite.SuiteOptions(
                batch_size=config.evaluate.batch_size,
                logit_scale=model.logit_scale,
                bad_samples=config.evaluate.bad_samples,
                draw=out is not None,
                world=self.world,
                failed=lambda key, error: failed.update({key: _described(error)}),
            ),
        )
        for key, problem in failed.items():
            self.say(f"error: the evaluation {key} at step {step} failed: {problem}; the run goes on without it")
        return results, failed


def _described(error: Exception) -> str:
    """An error in one line: bad input in its own words, others with their kind."""
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {one_line(error)}"


def _append(path: Path, record: dict[str, Any]) -> list[str]:
    """Append an evaluation; drop those of this step and later ones, which a resumed run does again.

    Returns: a line for the user if lines were damaged, which are set aside.
    """
    found = read_json_lines(path)
    rows = [(row.get("step"), line) for row, line in zip(found.rows, found.lines, strict=True)]
    damaged = found.damaged + [line.encode() for step, line in rows if not isinstance(step, int)]
    kept = [line for step, line in rows if isinstance(step, int) and step < record["step"]]
    atomic_write(path, "".join(f"{line}\n" for line in [*kept, json.dumps(record)]).encode())
    if not damaged:
        return []
    return [f"{path}: {len(damaged)} lines cannot be read; they are in {set_lines_aside(path, damaged)}"]
