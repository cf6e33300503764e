"""The measurement of losses compares equal things."""

import pytest

from scripts.bench.loss import Case, Loss, LossComparison, LossMeasurement, bench_loss, table


@pytest.mark.parametrize("loss", ["contrastive", pytest.param("siglip", marks=pytest.mark.slow)])
def test_both_sides_find_the_same_loss_and_gradient(loss: Loss) -> None:
    """open_clip's loss and ours, blocked, on the same features; none of theirs above the largest batch asked for."""
    small, large = bench_loss([96, 128], loss=loss, form="blocked", dim=16, rounds=1, threads=1, peer_up_to=96)
    assert small.ours[0].loss == pytest.approx(small.theirs[0].loss, rel=1e-5)
    assert small.ours[0].gradient_norm == pytest.approx(small.theirs[0].gradient_norm, rel=1e-4)
    assert (len(large.ours), len(large.theirs)) == (1, 0)


def test_the_table_gives_medians_and_ratios_with_their_range() -> None:
    """Ratios are ours to theirs, round by round."""
    case = Case("contrastive", "auto", 64, 8, "cpu", 1)
    ours = [LossMeasurement(s, 2**20, 4.0, 1.0) for s in (1.0, 2.0, 3.0)]
    theirs = [LossMeasurement(s, 2**22, 4.0, 1.0) for s in (4.0, 4.0, 4.0)]
    text = table([LossComparison(case, ours, theirs)])
    assert "time 0.500 [0.250, 0.750], memory 0.250 [0.250, 0.250]" in text
