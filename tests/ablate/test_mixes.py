"""Mixes as a user writes them."""

import pytest

from mmssl.ablate.mixes import default_mixes, parse_mix, parse_mixes, slug
from mmssl.config import ObjectiveConfig
from mmssl.types import UserError

CONFIGURED = {
    "mae": ObjectiveConfig(weight=0.1, mask_ratio=0.5),
    "contrastive": ObjectiveConfig(),
    "mlm": ObjectiveConfig(weight=0.2),
    "siglip": ObjectiveConfig(weight=0),
}


def test_default_mixes_start_with_contrastive_alone() -> None:
    """Contrastive, with each other objective that has a weight, and all; `all` is left out where it says nothing."""
    assert default_mixes(CONFIGURED) == ["contrastive", "contrastive+mae", "contrastive+mlm", "all"]
    assert default_mixes({"mlm": ObjectiveConfig(), "siglip": ObjectiveConfig()}) == ["siglip", "siglip+mlm"]
    assert default_mixes({"mlm": ObjectiveConfig(), "mae": ObjectiveConfig()}) == ["mlm", "mlm+mae"]


def test_a_mix_takes_entries_of_the_configuration_and_its_own_changes() -> None:
    """Options come from the configuration; those in brackets replace them; values may hold the separators."""
    mix = parse_mix("contrastive + mlm(weight=0.05,every=2) + mae(ratio=[1, 2],kind=a+b)", CONFIGURED)
    assert mix.name == "contrastive+mlm(weight=0.05,every=2)+mae(ratio=[1,2],kind=a+b)"
    assert mix.objectives == {
        "contrastive": {},
        "mlm": {"weight": 0.05, "every": 2},
        "mae": {"weight": 0.1, "mask_ratio": 0.5, "ratio": [1, 2], "kind": "a+b"},
    }
    assert slug(mix.name) == "contrastive+mlm_weight=0.05_every=2_+mae_ratio=_1_2_kind=a+b"
    assert [*parse_mix("all", {k: v for k, v in CONFIGURED.items() if v.weight}).objectives] == [
        "mae",
        "contrastive",
        "mlm",
    ]


@pytest.mark.parametrize(
    ("mixes", "words"),
    [
        (["contrastive", "contrastive+mim"], ["'mim'", "mae, contrastive, mlm", "objectives.mim.weight"]),
        (["contrastive", "mlm+mlm(weight=1)"], ["mlm", "twice"]),
        (["contrastive", "mlm("], ["'mlm('", "mlm(weight=0.05,every=2)"]),
        (["contrastive", "contrastive+"], ["''"]),
        (["contrastive", "mlm(weight)"], ["'weight'", "option=value"]),
        (["contrastive", "contrastive+siglip"], ["siglip", "weight 0"]),
        (["contrastive"], ["at least two"]),
        (["contrastive", " contrastive"], ["same name"]),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(mixes: list[str], words: list[str]) -> None:
    """The message names the mix, what is wrong and what to write."""
    with pytest.raises(UserError) as caught:
        parse_mixes(mixes, CONFIGURED)
    assert [w for w in words if w not in str(caught.value)] == []
    assert "\n" not in str(caught.value)
