"""Judging the model while it is trained, and which checkpoint is the best."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from mmssl.config import Config
from mmssl.distributed import World
from mmssl.errors import UserError
from mmssl.evaluate import suite
from mmssl.evaluate.datasets import open_dataset
from mmssl.evaluate.results import Metrics
from mmssl.files import atomic_write
from mmssl.inference.model import Model
from mmssl.train.state import RunState


@dataclass
class RunEvaluator:
    """Judges models on the configured suites."""

    config: Config
    accelerator: Accelerator
    world: World
    run: RunState

    def evaluate(self, model: Model, out: Path | None) -> dict[str, Metrics]:
        """`suite/task` -> figures, the same on every process, which share the work; tables and plots go to `out`."""
        suites = self.config.evaluate.suites
        results: dict[str, Metrics] = {}
        if not suites:
            return results
        datasets = {
            name: (open_dataset(entry.data, name=name, slice_by=entry.slice_by), entry.task)
            for name, entry in suites.items()
        }
        results = suite.run(
            model,
            datasets,
            out,
            batch_size=self.config.evaluate.batch_size,
            logit_scale=model.logit_scale,
            draw=out is not None,
            world=self.world,
        )
        if self.world.rank == 0:
            _note(
                self.config.run_dir / "evaluations.jsonl",
                {"step": self.run.step, "seconds": self.run.seconds, "results": results},
            )
            figures = {
                f"eval/{n}/{k}": v for n, m in results.items() for k, v in m.items() if isinstance(v, (int, float))
            }
            self.accelerator.log(figures, step=self.run.step)
        return results

    def update_best(self, results: dict[str, Metrics]) -> None:
        """Remember this step if it is the best so far.

        Raises:
            UserError: the metric to pick by is not among the results.
        """
        name = self.config.evaluate.best or next((f"{r}/{next(iter(m))}" for r, m in results.items()), None)
        if name is None:
            return
        result, _, metric = name.rpartition("/")
        if metric not in results.get(result, {}):
            known = ", ".join(f"{r}/{m}" for r, metrics in results.items() for m in metrics)
            raise UserError(f"evaluate.best={name!r} is not measured; there are: {known}")
        value = float(results[result][metric])
        if self.run.best is None or value > self.run.best[0]:
            self.run.best = (value, self.run.step)


def _note(path: Path, record: dict[str, Any]) -> None:
    """Append an evaluation; those of this step and later ones, which a resumed run does again, are dropped."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    kept = [line for line in lines if json.loads(line)["step"] < record["step"]]
    atomic_write(path, "".join(f"{line}\n" for line in [*kept, json.dumps(record)]).encode())
