"""Guards of what must not change by accident: numbers of a run, folders written earlier, help texts and keys."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import mmssl
from mmssl.config import load_config
from mmssl.train.trainer import train
from tests.golden import snapshots

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text(encoding="utf-8"))


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs name their shards relative to the repository."""
    monkeypatch.chdir(ROOT)


def test_twenty_steps_give_the_recorded_losses_and_weights(tmp_path: Path) -> None:
    """configs/ci_tiny.yaml gives the recorded losses and weights, to 1e-6 on any CPU."""
    golden = json.loads(snapshots.NUMBERS.read_text(encoding="utf-8"))
    found = snapshots.run_numbers(tmp_path / "run")
    assert found["losses"] == pytest.approx(golden["losses"], abs=1e-6)
    assert sorted(found["norms"]) == sorted(golden["norms"])
    if found["sha256"] != golden["sha256"]:  # another CPU rounds differently
        assert found["norms"] == pytest.approx(golden["norms"], abs=1e-5)


def test_a_model_folder_of_554f0ac_gives_its_features() -> None:
    """A model folder written by 554f0ac loads and encodes images and texts as it did then, to 1e-6."""
    model = mmssl.load(GOLDEN / "model")
    images = [(np.arange(20 * 24 * 3).reshape(20, 24, 3) * k % 251).astype(np.uint8) for k in (1, 7)]
    for features, expected in (
        (model.encode_image(images), EXPECTED["image_features"]),
        (model.encode_text(EXPECTED["texts"]), EXPECTED["text_features"]),
    ):
        torch.testing.assert_close(features, torch.tensor(expected), rtol=0, atol=1e-6)


def test_a_run_of_554f0ac_resumes(tmp_path: Path) -> None:
    """A run folder written by 554f0ac, with a checkpoint at step 3, resumes and ends with that commit's own losses."""
    run = tmp_path / "run"
    shutil.copytree(GOLDEN / "run", run)
    train(load_config(run / "config.yaml", [f"run_dir={run}"]), resume=True)
    assert losses(run) == pytest.approx(EXPECTED["losses"], abs=1e-6)


def test_help_is_the_recorded_one() -> None:
    """Every verb's help text is the recorded one."""
    assert snapshots.help_text() == snapshots.HELP.read_text(encoding="utf-8")


def test_configuration_keys_are_the_recorded_ones() -> None:
    """The configuration knows the recorded keys and no others."""
    assert snapshots.config_keys() == snapshots.KEYS.read_text(encoding="utf-8")
