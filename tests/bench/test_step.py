"""The measurement of steps compares equal things."""

from pathlib import Path
from typing import Any

import pytest

from mmssl.config import Config, parse_config
from mmssl.errors import UserError
from scripts.bench.step import StepBench, StepMeasurement, bench_step
from tests.helpers.tiny_runs import run_tree, write_pairs

VISION = {
    "name": "open_clip:ViT-B-32",
    "image_size": 16,
    "options": {"layers": 1, "width": 32, "head_width": 16, "patch_size": 4},
}


def config(tmp_path: Path, **changes: Any) -> Config:
    shards = tmp_path / "shards"
    shards.mkdir(exist_ok=True)
    tree = run_tree(write_pairs(shards), tmp_path / "run", **changes)
    text = {**tree["model"]["text"]["config"], "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    tree["model"]["text"] = {**tree["model"]["text"], "config": text}
    return parse_config(tree, "test")


@pytest.mark.slow
def test_both_sides_have_the_same_weights_and_batch(tmp_path: Path) -> None:
    """Before the first update, open_clip's loss on its own model is ours; each side is measured in every round."""
    settings = config(tmp_path, model__vision=VISION)
    found = bench_step(settings, ["all"], rounds=2, steps=1)
    assert list(found.sides) == ["all", "open_clip"]
    ours, theirs = found.sides["all"], found.sides["open_clip"]
    assert len(ours) == len(theirs) == 2
    assert ours[0].loss == pytest.approx(theirs[0].loss, rel=1e-5)
    assert ours[0].loss == ours[1].loss
    assert ours[0].flops > 0
    assert min(m.peak_bytes for m in ours + theirs) > 2**20
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_mixes_are_measured_beside_the_first(tmp_path: Path) -> None:
    """A mix takes more operations than contrastive alone, and its loss is another."""
    found = bench_step(config(tmp_path), ["contrastive", "contrastive+mlm"], peer=False, rounds=1, steps=1)
    alone, mixed = found.sides["contrastive"][0], found.sides["contrastive+mlm"][0]
    assert mixed.flops > alone.flops
    assert mixed.loss > alone.loss
    assert "contrastive+mlm / contrastive: step time x" in found.text()


def test_the_table_gives_medians_and_ratios_with_their_range() -> None:
    """Speeds, memory and utilisation follow from seconds, batch and operations."""
    ours = [StepMeasurement(s, 100 * 2**20, 2.5, 1e9) for s in (0.5, 0.4, 0.6)]
    theirs = [StepMeasurement(s, 200 * 2**20, 2.5, 0.0) for s in (1.0, 1.0, 0.9)]
    text = StepBench(100, {"ours": ours, "theirs": theirs}).text(peak_tflops=2.0)
    assert "0.500      200.0       100    2.500000  0.20 TFLOP/s, MFU 10.0%" in text
    assert "theirs / ours: step time x 2.000 [1.500, 2.500], peak memory x 2.000 [2.000, 2.000]" in text


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    """Towers that open_clip does not build, a size that depends on free memory, and unknown objectives."""
    with pytest.raises(UserError, match="--no-peer"):
        bench_step(config(tmp_path), ["all"], rounds=1)
    with pytest.raises(UserError, match="micro_batch=auto"):
        bench_step(config(tmp_path, train__micro_batch="auto"), ["all"], rounds=1)
    with pytest.raises(UserError, match="unknown objective"):
        bench_step(config(tmp_path), ["contrastive+sorcery"], peer=False, rounds=1)
