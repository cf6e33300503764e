"""The example of an objective outside the package."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mmssl.config import load_config, parse_config
from mmssl.errors import UserError
from mmssl.objectives import find_objective
from mmssl.train.trainer import train
from tests.helpers.tiny_runs import run_tree, write_pairs

NAME = "scripts.examples.custom_objective"


def test_an_objective_with_a_dotted_path_trains_and_resumes(tmp_path: Path) -> None:
    """A run logs the example's loss and saves its weights and buffers. Resumed from an earlier checkpoint, it ends with
    the same ones."""
    run = tmp_path / "run"
    entries = {"contrastive": {}, NAME: {"weight": 0.5, "tolerance": 0.2}}
    config = parse_config(run_tree(write_pairs(tmp_path), run, objectives=entries), where="test")
    train(config)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= record[f"{NAME}.loss"] < 10 for record in records)
    first, *later = sorted((run / "checkpoints").glob("step-*"))
    expected = _own_weights(later[-1])
    for folder in later:
        shutil.rmtree(folder)
    train(config, resume=True)
    found = _own_weights(later[-1])
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    key = next(name for name in found if name.endswith(".seen"))
    assert (int(_own_weights(first)[key]), int(found[key])) == (8 * 6, 8 * 8)


def test_an_override_changes_an_entry_with_dots(tmp_path: Path) -> None:
    """`objectives.NAME.weight=0.2` reaches the entry of the file, though the name has dots."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(run_tree(tmp_path, tmp_path, objectives={"contrastive": {}, NAME: {"weight": 0.5}})))
    config = load_config(path, [f"objectives.{NAME}.weight=0.2", "objectives.contrastive.every=2"])
    assert (config.objectives[NAME].weight, config.objectives["contrastive"].every) == (0.2, 2)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("clip", "unknown objective 'clip'"),
        ("no_such_lab.brightness", "no module 'no_such_lab'"),
        ("scripts.examples", "0 classes"),
        (f"{NAME}:Missing", "no class 'Missing'"),
        (f"{NAME}:World", "no class 'World'"),
    ],
)
def test_a_wrong_name_is_one_line(name: str, words: str) -> None:
    """Unknown names, modules that are missing and classes of another kind are errors of the user."""
    with pytest.raises(UserError, match=words) as caught:
        find_objective(name)
    assert "\n" not in str(caught.value)


def test_a_class_is_named_behind_a_colon() -> None:
    """`MODULE:CLASS` and a module with one objective are the same class."""
    assert find_objective(f"{NAME}:Brightness") is find_objective(NAME)


def _own_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The weights and buffers of the example."""
    weights = load_file(checkpoint / "model.safetensors")
    return {name: value for name, value in weights.items() if "custom_objective" in name}
