"""Towers have the stated costs, and their presets are configurations."""

import pytest
from accelerate import Accelerator

from mmssl.apps.autoconfig import Machine, Pairs, choose
from mmssl.apps.autoconfig.towers import TOWERS, Towers
from mmssl.build import objective_options
from mmssl.config import Config, load_config, parse_config, set_key
from mmssl.train.cost import fit_micro_batch, untrained_task

TOKENS = 32


def config_of(towers: Towers) -> Config:
    """The configuration chosen at the towers' number of pairs."""
    machine = Machine(8, 2**36, (2**36,), True)
    tree: dict[str, object] = {"run_dir": "run", "data": {"train": "x.tar"}}
    for choice in choose(Pairs(max(8, towers.least_pairs), TOKENS - 2, towers.sizes[-1]), machine):
        set_key(tree, choice.key, choice.value)
    return parse_config(tree, "test")


@pytest.mark.parametrize(
    "towers",
    [
        pytest.param(TOWERS[0], id="small"),
        pytest.param(TOWERS[1], id="medium", marks=pytest.mark.slow),
        pytest.param(TOWERS[2], id="large", marks=pytest.mark.slow),
    ],
)
def test_parameters_and_activations_are_as_stated(towers: Towers) -> None:
    """Stated costs are at most a quarter above the parameters of the built towers and the activations that
    `train.micro_batch=auto` measures in fp32, and not below them."""
    config = config_of(towers)
    task = untrained_task(config, objective_options(config))
    parameters = sum(p.numel() for p in task.parameters())
    assert parameters <= towers.parameters <= 1.25 * parameters
    _, why = fit_micro_batch(task, 4, TOKENS, {"contrastive": 1.0}, Accelerator(cpu=True), 2**40)
    per_pair = float(why.split()[0]) * 2**20
    assert per_pair <= towers.pair_bytes(towers.sizes[-1], TOKENS) <= 1.25 * per_pair


@pytest.mark.parametrize("towers", TOWERS, ids=lambda towers: towers.preset)
def test_presets_are_configurations(towers: Towers) -> None:
    """Every preset is a complete configuration with the largest input size."""
    config = load_config(towers.preset)
    assert config.model.vision.image_size == towers.sizes[-1]
    assert (towers.lr, towers.lr_batch) == (config.optim.lr, config.data.batch_size)


def test_settings_are_copies() -> None:
    """A changed value does not change the preset; a missing key is None."""
    towers = TOWERS[0]
    towers.setting("data.views.main")["flip"] = 1.0
    assert "flip" not in towers.setting("data.views.main")
    assert towers.setting("optim.nothing") is None
