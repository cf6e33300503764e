"""Hard pairs through the suite."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from mmssl.errors import UserError
from mmssl.evaluate import compare, suite
from tests.helpers.toy_encoder import ToyEncoder, pack, paint

OPTIONS = suite.SuiteOptions(draw=False)


def evaluate(shard: Path, noise: float = 0.0, out: Path | None = None) -> dict[str, Any]:
    (found,) = suite.run(ToyEncoder(noise=noise), {"p": (str(shard), "pairs")}, out, OPTIONS).values()
    return found


def test_the_right_caption_among_wrong_ones(tmp_path: Path) -> None:
    """A perfect encoder is always right; a noisy one is right where its own similarities say so; chance is the mean of
    1 / (1 + wrong captions)."""
    records = [
        {
            "png": paint(100 + n, n),
            "txt": f"thing {100 + n}",
            "json": {"negatives": [f"thing {101 + n}", f"thing {102 + n}"] if n % 2 else f"thing {101 + n}"},
        }
        for n in range(40)
    ]
    shard = pack(tmp_path / "p.tar", records)
    assert evaluate(shard)["caption_accuracy"] == 1.0
    found = evaluate(shard, 3.0, tmp_path / "out")
    encoder = ToyEncoder(noise=3.0)
    expected = []
    for n in range(40):
        texts = [f"thing {100 + n}", f"thing {101 + n}", *([f"thing {102 + n}"] if n % 2 else [])]
        scores = encoder.encode_image([paint(100 + n, n)]) @ encoder.encode_text(texts).T
        expected.append(float(bool((scores[0, 0] > scores[0, 1:]).all())))
    assert 0.3 < found["caption_accuracy"] < 1
    assert found["caption_accuracy"] == pytest.approx(sum(expected) / 40)
    assert found["baselines"]["caption_accuracy"]["chance"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert (found["samples"], found["wrong_captions"]) == (40, 60)
    with (tmp_path / "out" / "p" / "pairs" / "outcomes.csv").open() as file:
        assert [float(row["caption_accuracy"]) for row in csv.DictReader(file)] == expected


def groups(folder: Path, count: int) -> Path:
    """Groups of two samples, whose members stand apart."""
    order = [n for part in (0, 1) for n in range(part, 2 * count, 2)]
    records = [{"png": paint(100 + n, n), "txt": f"thing {100 + n}", "json": {"group": f"g{n // 2}"}} for n in order]
    return pack(folder / "g.tar", records)


def test_groups_have_winogrounds_scores(tmp_path: Path) -> None:
    """Text, image and group score are those of the four similarities of each group; two models are compared by group,
    and the less noisy one wins."""
    shard = groups(tmp_path, 60)
    assert {evaluate(shard)[f"{kind}_score"] for kind in ("text", "image", "group")} == {1.0}
    found = evaluate(shard, 4.0, tmp_path / "bad")
    encoder, hits = ToyEncoder(noise=4.0), torch.zeros(3)
    for g in range(60):
        images = encoder.encode_image([paint(100 + n, n) for n in (2 * g, 2 * g + 1)])
        s = images @ encoder.encode_text([f"thing {100 + n}" for n in (2 * g, 2 * g + 1)]).T
        text, image = s[0, 0] > s[0, 1] and s[1, 1] > s[1, 0], s[0, 0] > s[1, 0] and s[1, 1] > s[0, 1]
        hits += torch.tensor([text, image, text and image])
    scores = [found[f"{kind}_score"] for kind in ("text", "image", "group")]
    assert scores == pytest.approx((hits / 60).tolist())
    assert 0.1 < scores[2] < 0.95
    assert found["baselines"]["group_score"]["chance"] == pytest.approx(1 / 6)
    assert (found["samples"], found["groups"]) == (120, 60)
    evaluate(shard, 0.5, tmp_path / "good")
    changes = compare.compare_results(tmp_path / "bad", tmp_path / "good")
    assert changes["p/pairs/group_score"].difference == pytest.approx(1 - scores[2], abs=0.05)
    assert changes["p/pairs/group_score"].p_value is not None
    assert changes["p/pairs/group_score"].p_value < 0.01


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    """A sample whose partner's image is broken is left out and counted; groups of three, and data of both kinds, are
    errors; samples without wrong captions are left out as others are."""
    record = {"png": paint(1), "txt": "thing 1"}
    shard = groups(tmp_path, 10)
    broken = pack(
        tmp_path / "b.tar",
        [{"png": paint(n) if n else b"x", "txt": f"thing {n}", "json": {"group": n // 2}} for n in range(20)],
    )
    found = evaluate(broken)
    assert (found["groups"], found["samples_without_partner"], found["bad_samples"]) == (9, 1, 1)
    assert "samples_without_partner" not in evaluate(shard)
    three = pack(tmp_path / "3.tar", [{**record, "json": {"group": 1}}] * 3)
    with pytest.raises(UserError, match="group '1' of dataset 'p' has 3 usable samples"):
        evaluate(three)
    mixed = pack(tmp_path / "m.tar", [{**record, "json": {"group": 1}}, {**record, "json": {"negatives": ["thing 2"]}}])
    with pytest.raises(UserError, match="some samples .* have a 'group' and others do not"):
        evaluate(mixed)
    bare = pack(tmp_path / "n.tar", [record] * 3)
    with pytest.raises(UserError, match="neither wrong captions nor a group"):
        evaluate(bare)
