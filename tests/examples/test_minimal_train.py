"""scripts/examples/minimal_train.py trains on the repository's shards."""

import math
from pathlib import Path

from scripts.examples.minimal_train import main

ROOT = Path(__file__).parents[2]


def test_two_steps_train() -> None:
    """Two steps of 64 pairs give finite losses near ln 64, the loss of a model that knows nothing."""
    losses = main(steps=2, shards=str(ROOT / "shards" / "train" / "*.tar"))
    assert len(losses) == 2
    assert all(abs(loss - math.log(64)) < 1.5 for loss in losses)
