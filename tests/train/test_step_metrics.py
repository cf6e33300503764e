"""What is read of a step, and when a run gives up."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmssl.config import parse_config
from mmssl.distributed import World
from mmssl.errors import UserError
from mmssl.train.loggers import StepLog, _Remaining
from mmssl.train.optim import Length
from mmssl.train.state import RunState
from mmssl.train.step import Tally
from mmssl.train.step_metrics import STREAM, StepMetrics
from mmssl.types import Batch
from tests.helpers.tiny_runs import run_tree

TOLD = {**dict.fromkeys((*STREAM, "save", "stop"), (0.0, 0.0)), "seconds": (2.0, 0.0), "mlm.time_share": (0.5, 1.0)}


@contextmanager
def numbers(run: Path, scaler: object = None) -> Iterator[StepMetrics]:
    """Those of a run of 100 steps, with a log and nothing else around them."""
    config = parse_config(run_tree(run, run, train__log_samples=False), "test")
    quiet = SimpleNamespace(say=print, update=lambda *_: None)
    accelerator = SimpleNamespace(scaler=scaler, log=lambda *_, **__: None)
    with StepLog(run / "metrics.jsonl", 0) as log:
        settings: Any = (config, accelerator, World(), RunState(), Length(100, None), {"metrics": log}, quiet)
        yield StepMetrics(*settings)


def step(reader: StepMetrics, norm: float, masked: int = 1) -> None:
    """One step with contrastive loss 2 at weight 1 and mlm loss 3 (a mean of `masked` terms) at weight 0.5."""
    tally = Tally()
    tally.add("contrastive.loss", torch.tensor(8.0), 4.0)
    tally.add("mlm.loss", torch.tensor(3.0 * masked), float(masked))
    tally.add("gradient_norm", torch.tensor(norm), 1.0)
    tokens = torch.zeros(1, 1, dtype=torch.int64)
    batch = Batch({}, tokens, tokens.bool(), torch.arange(1), ["shard:key"])
    weights = {"contrastive": 1.0, "mlm": 0.5}
    reader.pending = reader.reduce(tally, weights, {"samples_per_s": 1.0, "data_wait": 0.0}, batch, TOLD)
    reader.run.step += 1
    reader.read()


def test_sums_become_means_and_the_total(tmp_path: Path) -> None:
    """Sums over counts; the loss is their weighted sum, to which a loss without a term adds nothing."""
    with numbers(tmp_path) as reader:
        step(reader, 1.5)
        step(reader, 1.5, masked=0)
    first, second = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert (first["loss"], first["mlm.loss"], first["gradient_norm"]) == (2 + 0.5 * 3, 3.0, 1.5)
    assert (first["mlm.time_share"], first["seconds"], second["seconds"]) == (0.5, 2.0, 4.0)
    assert (second["loss"], second["mlm.loss"]) == (2.0, None)


@pytest.mark.parametrize(("scaler", "most"), [(None, 5), (object(), 5 + 16)])
def test_a_scaler_may_skip_more(tmp_path: Path, scaler: object, most: int) -> None:
    """Five updates in a row that are not finite end a run; under fp16 sixteen more, from 2 ** 16 to 1, are allowed for
    the search of the gradient's scale. One finite update in between begins the count anew."""
    with numbers(tmp_path, scaler) as reader:
        for _ in range(most - 1):
            step(reader, math.inf)
        step(reader, 1.0)
        for _ in range(most - 1):
            step(reader, math.nan)
        with pytest.raises(UserError, match=f"at {most} steps in a row"):
            step(reader, math.nan)


def test_time_left_of_a_resumed_run() -> None:
    """A quarter took 100 seconds after half of the run was there: the last quarter takes as long."""
    task: Any = SimpleNamespace(completed=0.75, elapsed=100.0, fields={"before": 0.5})
    assert _Remaining().render(task).plain == "ETA 01:40"
