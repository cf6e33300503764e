"""Evaluation in and after training, and the choice of the best checkpoint."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from mmssl.build import RunPlan, evaluation_names
from mmssl.distributed import World
from mmssl.errors import UserError, one_line
from mmssl.evaluate import Metrics
from mmssl.files import atomic_write, read_json_lines, set_lines_aside
from mmssl.inference import Model
from mmssl.train.state import RunState


@dataclass(frozen=True)
class RunEvaluator:
    """Evaluates models on the suites of a run."""

    plan: RunPlan
    accelerator: Accelerator
    world: World
    run: RunState
    say: Callable[[str], None]
    """Says a line to the user, on process 0."""

    def evaluate(self, model: Model, out: Path | None) -> dict[str, Metrics]:
        """`suite/task` -> metrics, the same on every process; the processes share the work.

        An evaluation that fails is said and recorded, and has no metrics: it never ends a training.

        Args:
            out: folder for tables and plots.
        """
        if not self.plan.suites:
            return {}
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
            self.say(
                f"error: the evaluation {key} at step {self.run.step} failed: {problem}; the run goes on without it"
            )
        if self.world.rank == 0:
            record = {"step": self.run.step, "seconds": self.run.seconds, "results": results}
            record |= {"failed": failed} if failed else {}
            for line in _append(config.run_dir / "evaluations.jsonl", record):
                self.say(f"warning: {line}")
            numbers = {
                f"eval/{n}/{k}": v for n, m in results.items() for k, v in m.items() if isinstance(v, (int, float))
            }
            self.accelerator.log(numbers, step=self.run.step)
        return results

    def update_best(self, results: dict[str, Metrics]) -> None:
        """Record this step if it is the best so far."""
        if not results:
            return
        name = self.plan.config.evaluate.best
        result, _, metric = (name or "").rpartition("/")
        if name is None:
            result = evaluation_names(self.plan.suites)[0]
            metric = next(iter(results.get(result, {})), "")
        if result not in results:
            return  # it failed, which was said
        if metric not in results[result]:
            known = ", ".join(f"{result}/{measured}" for measured in results[result])
            self.say(f"error: evaluate.best={name!r} is not measured; choose one of: {known}")
            return
        value = float(results[result][metric])
        if self.run.best is None or value > self.run.best[0]:
            self.run.best = (value, self.run.step)


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
