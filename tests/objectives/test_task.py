"""The mixer's schedule and plan, and how objectives are found."""

import pytest
import torch
import yaml

from mmssl.build import complete_config, objective_options
from mmssl.config import ObjectiveConfig, dump_config, parse_config
from mmssl.errors import UserError
from mmssl.models import DualEncoder
from mmssl.objectives import find_objective, objective_names
from mmssl.objectives._base import IMAGE, TEXT, Vocabulary
from mmssl.objectives._mixing import encoder_passes, weight_at
from tests.helpers.models import TINY_TEXT


def test_a_weight_starts_ramps_rests_and_ends() -> None:
    """Zero before start and after end, linear over the ramp, and only on every k-th step."""
    plain = ObjectiveConfig(weight=0.5)
    assert [weight_at(plain, step, step / 10) for step in range(11)] == [0.5] * 11
    ramped = ObjectiveConfig(weight=2.0, start=0.2, end=0.8, ramp=0.4)
    found = [weight_at(ramped, 0, progress) for progress in (0.0, 0.1, 0.2, 0.4, 0.6, 0.7, 0.9)]
    assert found == pytest.approx([0, 0, 0, 1, 2, 2, 0])
    third = ObjectiveConfig(every=3)
    assert [weight_at(third, step, 0.5) > 0 for step in range(7)] == [True, False, False, True, False, False, True]


def test_equal_forwards_run_once(tiny_encoder: DualEncoder) -> None:
    """Two objectives on the clean image and caption ask for two forwards, not four."""
    kind = find_objective("contrastive")
    words = Vocabulary(100, 4, (0,), torch.zeros(100, dtype=torch.bool), 77)
    objectives = [kind(kind.Options(), tiny_encoder, words) for _ in range(2)]
    assert encoder_passes(objectives) == (IMAGE, TEXT)


def test_objectives_are_found_by_name() -> None:
    """Every module of the room is an objective with typed options; an unknown name lists them. Contrastive weighs 1,
    and no other more."""
    assert "contrastive" in objective_names()
    for name in objective_names():
        assert find_objective(name).Options().weight <= find_objective("contrastive").Options().weight == 1.0
    with pytest.raises(UserError, match="choose from .*contrastive"):
        find_objective("clip")


def test_unknown_options_name_the_known_ones() -> None:
    """An objective's entry is checked against its own options."""
    tree = {
        "run_dir": "x",
        "data": {"train": "x.tar"},
        "model": {"text": {"config": TINY_TEXT, "tokenizer": "train"}},
        "train": {"steps": 1},
        "objectives": {"contrastive": {"weight": 1, "temprature": 2}},
    }
    with pytest.raises(UserError, match=r"objectives\.contrastive\.temprature.*weight"):
        objective_options(parse_config(tree, "here"))


def test_the_resolved_configuration_holds_each_objectives_defaults() -> None:
    """What is not given comes from the objective; the resolved configuration, written and read again, is the same."""
    tree = {
        "run_dir": "x",
        "data": {"train": "x.tar"},
        "model": {"text": {"config": TINY_TEXT, "tokenizer": "train"}},
        "train": {"steps": 1},
        "objectives": {"mae": {"mask_ratio": 0.5}, "simclr": {}},
    }
    config, options = complete_config(parse_config(tree, "here"))
    assert (options["mae"].weight, options["simclr"].weight) == (0.1, 1.0)
    again = parse_config(yaml.safe_load(dump_config(config)), "there")
    assert complete_config(again) == (config, options)
