"""Mixes as a user writes them."""

import pytest

from mmssl.config import ObjectiveConfig
from mmssl.errors import UserError
from mmssl.objectives._mix_spec import parse_mix

CONFIGURED = {
    "mae": ObjectiveConfig(weight=0.1, mask_ratio=0.5),
    "contrastive": ObjectiveConfig(),
    "mlm": ObjectiveConfig(weight=0.2),
    "siglip": ObjectiveConfig(weight=0),
}


def test_a_mix_takes_entries_of_the_configuration_and_its_own_changes() -> None:
    """Options come from the configuration; those in brackets replace them; values may hold the separators."""
    mix = parse_mix("contrastive + mlm(weight=0.05,every=2) + mae(ratio=[1, 2],kind=a+b)", CONFIGURED)
    assert mix.name == "contrastive+mlm(weight=0.05,every=2)+mae(ratio=[1,2],kind=a+b)"
    assert mix.objectives == {
        "contrastive": {},
        "mlm": {"weight": 0.05, "every": 2},
        "mae": {"weight": 0.1, "mask_ratio": 0.5, "ratio": [1, 2], "kind": "a+b"},
    }


def test_all_is_what_is_configured_with_a_weight() -> None:
    """An entry of weight 0 is switched off."""
    assert [*parse_mix("all", CONFIGURED).objectives] == ["mae", "contrastive", "mlm"]


def test_an_objective_without_an_entry_has_its_own_defaults() -> None:
    """Nothing is written for it, so the objective's own options apply."""
    assert parse_mix("contrastive+rotation", CONFIGURED).objectives == {"contrastive": {}, "rotation": {}}


@pytest.mark.parametrize(
    ("mix", "words"),
    [
        ("contrastive+mim", ["'mim'", "mae, maskfeat, mlm, moco"]),
        ("mlm+mlm(weight=1)", ["mlm", "twice"]),
        ("mlm(", ["'mlm('", "mlm(weight=0.05,every=2)"]),
        ("contrastive+", ["''"]),
        ("mlm(weight)", ["'weight'", "option=value"]),
        ("contrastive+siglip", ["siglip", "weight 0"]),
    ],
)
def test_what_is_no_mix_is_refused_in_one_line(mix: str, words: list[str]) -> None:
    """The message names the mix, what is wrong and what to write."""
    with pytest.raises(UserError) as caught:
        parse_mix(mix, CONFIGURED)
    assert [w for w in words if w not in str(caught.value)] == []
    assert "\n" not in str(caught.value)
