"""The mixes of an ablation."""

import pytest

from mmssl.apps.ablate.mixes import default_mixes, parse_mixes, slug
from mmssl.config import ObjectiveConfig
from mmssl.errors import UserError

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


def test_a_mix_names_a_folder() -> None:
    """What no file system dislikes."""
    assert (
        slug("contrastive+mlm(weight=0.05,every=2)+mae(ratio=[1,2])")
        == "contrastive+mlm_weight=0.05_every=2_+mae_ratio=_1_2"
    )


@pytest.mark.parametrize(
    ("mixes", "words"),
    [
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
