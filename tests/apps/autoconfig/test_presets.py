"""What is stated of the chosen towers is what they are."""

import pytest
from accelerate import Accelerator

from mmssl.apps.autoconfig import Machine, Pairs, choose
from mmssl.apps.autoconfig.presets import LARGE, MEDIUM, SMALL, Towers
from mmssl.build import objective_options
from mmssl.config import Config, parse_config, set_key
from mmssl.train.cost import fit_micro_batch, untrained_task

TOKENS = 32


def config_of(towers: Towers) -> Config:
    """The configuration that is chosen at the towers' number of pairs."""
    machine = Machine(8, 2**36, (2**36,), True)
    tree: dict[str, object] = {"run_dir": "run", "data": {"train": "x.tar"}}
    for choice in choose(Pairs(max(8, towers.least_pairs), TOKENS - 2, towers.sizes[-1]), machine):
        set_key(tree, choice.key, choice.value)
    return parse_config(tree, "test")


@pytest.mark.parametrize(
    "towers",
    [
        pytest.param(SMALL, id="small"),
        pytest.param(MEDIUM, id="medium", marks=pytest.mark.slow),
        pytest.param(LARGE, id="large", marks=pytest.mark.slow),
    ],
)
def test_parameters_and_activations_are_as_stated(towers: Towers) -> None:
    """Weights are counted on the built towers, activations by `train.micro_batch=auto`'s measurement in fp32: what is
    stated is not less, and not more than a quarter too much."""
    config = config_of(towers)
    task = untrained_task(config, objective_options(config))
    parameters = sum(p.numel() for p in task.parameters())
    assert parameters <= towers.parameters <= 1.25 * parameters
    _, why = fit_micro_batch(task, 4, TOKENS, {"contrastive": 1.0}, Accelerator(cpu=True), 2**40)
    a_pair = float(why.split()[0]) * 2**20
    assert a_pair <= towers.pair_bytes(towers.sizes[-1], TOKENS) <= 1.25 * a_pair
