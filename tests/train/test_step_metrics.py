"""The record of a step, and the point at which a run gives up."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from rich.console import Console

from mmssl.config import Length, parse_config
from mmssl.distributed import World
from mmssl.errors import UserError
from mmssl.train.loggers import RunLogger
from mmssl.train.recovery import NonFiniteGuard
from mmssl.train.state import RunState
from mmssl.train.step import Tally
from mmssl.train.step_metrics import STREAM, StepMetrics
from mmssl.types import Batch
from tests.helpers.tiny_runs import run_tree

HOST_VALUES = {
    **dict.fromkeys((*STREAM, "save", "stop"), (0.0, 0.0)),
    "seconds": (2.0, 0.0),
    "mlm.time_share": (0.5, 1.0),
}


@contextmanager
def step_metrics(run: Path, scaled: bool = False) -> Iterator[StepMetrics]:
    """The metrics of a run of 100 steps, with a log and no trackers."""
    config = parse_config(run_tree(run, run, train__log_samples=False), "test")
    state = RunState()
    guard = NonFiniteGuard(config, state, 0, scaled)
    console, length = Console(quiet=True), Length(100, None)
    with RunLogger(config, state, length, console, track=lambda *_, **__: None, main=True) as logger:
        yield StepMetrics(World(), state, logger, guard, log_ids=False)


def step(reader: StepMetrics, norm: float, masked: int = 1) -> None:
    """One step with contrastive loss 2 at weight 1 and mlm loss 3 (a mean of `masked` terms) at weight 0.5."""
    tally = Tally()
    tally.add("contrastive.loss", torch.tensor(8.0), 4.0)
    tally.add("mlm.loss", torch.tensor(3.0 * masked), float(masked))
    tally.add("gradient_norm", torch.tensor(norm), 1.0)
    tokens = torch.zeros(1, 1, dtype=torch.int64)
    batch = Batch({}, tokens, tokens.bool(), torch.arange(1), ["shard:key"])
    weights = {"contrastive": 1.0, "mlm": 0.5}
    reader.read(reader.reduce(tally, weights, {"samples_per_s": 1.0, "data_wait": 0.0}, batch, HOST_VALUES))
    reader.read()


def test_sums_become_means_and_the_total(tmp_path: Path) -> None:
    """Sums over counts; the loss is their weighted sum, to which a loss without a term adds nothing."""
    with step_metrics(tmp_path) as reader:
        step(reader, 1.5)
        step(reader, 1.5, masked=0)
    first, second = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert (first["loss"], first["mlm.loss"], first["gradient_norm"]) == (2 + 0.5 * 3, 3.0, 1.5)
    assert (first["mlm.time_share"], first["seconds"], second["seconds"]) == (0.5, 2.0, 4.0)
    assert (second["loss"], second["mlm.loss"]) == (2.0, None)


@pytest.mark.parametrize(("scaled", "most"), [(False, 5), (True, 5 + 16)])
def test_a_scaler_may_skip_more(tmp_path: Path, scaled: bool, most: int) -> None:
    """Five updates in a row that are not finite end a run; under fp16 sixteen more, from 2 ** 16 to 1, are allowed for
    the search of the gradient's scale. One finite update in between begins the count anew."""
    with step_metrics(tmp_path, scaled) as reader:
        for _ in range(most - 1):
            step(reader, math.inf)
        step(reader, 1.0)
        for _ in range(most - 1):
            step(reader, math.nan)
        with pytest.raises(UserError, match=f"at {most} steps in a row"):
            step(reader, math.nan)
