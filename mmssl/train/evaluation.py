"""Evaluation in and after training, and the choice of the best checkpoint."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from mmssl.build import RunPlan
from mmssl.distributed import World
from mmssl.errors import UserError
from mmssl.evaluate import Metrics
from mmssl.files import atomic_write
from mmssl.inference import Model
from mmssl.train.state import RunState


@dataclass(frozen=True)
class RunEvaluator:
    """Evaluates models on the suites of a run."""

    plan: RunPlan
    accelerator: Accelerator
    world: World
    run: RunState

    def evaluate(self, model: Model, out: Path | None) -> dict[str, Metrics]:
        """`suite/task` -> metrics, the same on every process; the processes share the work.

        Args:
            out: folder for tables and plots.
        """
        if not self.plan.suites:
            return {}
        from mmssl.evaluate import suite  # a run without evaluation does not load the tasks

        config = self.plan.config
        results = suite.run(
            model,
            self.plan.suites,
            out,
            suite.SuiteOptions(
                batch_size=config.evaluate.batch_size,
                logit_scale=model.logit_scale,
                draw=out is not None,
                world=self.world,
            ),
        )
        if self.world.rank == 0:
            record = {"step": self.run.step, "seconds": self.run.seconds, "results": results}
            _append(config.run_dir / "evaluations.jsonl", record)
            numbers = {
                f"eval/{n}/{k}": v for n, m in results.items() for k, v in m.items() if isinstance(v, (int, float))
            }
            self.accelerator.log(numbers, step=self.run.step)
        return results

    def update_best(self, results: dict[str, Metrics]) -> None:
        """Record this step if it is the best so far.

        Raises:
            UserError: the results lack the metric that picks the best step.
        """
        name = self.plan.config.evaluate.best or next((f"{r}/{next(iter(m))}" for r, m in results.items()), None)
        if name is None:
            return
        result, _, metric = name.rpartition("/")
        if metric not in results.get(result, {}):
            known = ", ".join(f"{r}/{m}" for r, metrics in results.items() for m in metrics)
            raise UserError(f"evaluate.best={name!r} is not measured; choose one of: {known}")
        value = float(results[result][metric])
        if self.run.best is None or value > self.run.best[0]:
            self.run.best = (value, self.run.step)


def _append(path: Path, record: dict[str, Any]) -> None:
    """Append an evaluation; drop those of this step and later ones, which a resumed run does again."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    kept = [line for line in lines if json.loads(line)["step"] < record["step"]]
    atomic_write(path, "".join(f"{line}\n" for line in [*kept, json.dumps(record)]).encode())
