"""The mathematics of verdicts against SciPy, and the words they are told in."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.stats  # type: ignore[import-untyped]

from mmssl.apps.ablate.results import MixComparison, compare_mixes, decide, read_runs, sentence
from mmssl.stats import paired_t


@pytest.mark.parametrize(
    ("metric", "differences", "over_samples", "verdict"),
    [
        ("acc1", [0.02, 0.021, 0.019], (0.01, 0.03), "helps"),
        ("acc1", [-0.02, -0.021, -0.019], (-0.03, -0.01), "hurts"),
        ("acc1", [0.02, 0.021, 0.019], (-0.001, 0.04), "no difference"),
        ("acc1", [0.02, -0.01, 0.05], (0.01, 0.03), "no difference"),
        ("acc1", [0.02, 0.021, 0.019], None, "helps"),
        ("image_retrieval_median_rank", [2.0, 2.1, 1.9], None, "hurts"),
        ("calibration_error", [-0.02, -0.021, -0.019], None, "helps"),
        ("acc1", [0.0, 0.0, 0.0], (0.0, 0.0), "no difference"),
    ],
)
def test_a_verdict_needs_every_interval_beside_0(
    metric: str, differences: list[float], over_samples: tuple[float, float] | None, verdict: str
) -> None:
    """Both intervals must lie on one side; the good side depends on the metric."""
    assert decide(metric, paired_t(differences), over_samples) == verdict


class Run:
    """The part of a finished run that `compare_mixes` reads."""

    def __init__(self, right: list[int]) -> None:
        values = np.array(right, dtype=np.float64)
        self.results = {"a/zero_shot": {"acc1": float(values.mean()), "calibration_error": 0.1}}
        self.outcomes = {"a/zero_shot": ([str(i) for i in range(len(right))], {"acc1": values})}


def test_a_mix_is_compared_seed_by_seed() -> None:
    """Only seeds finished in both count; the sentence has verdict, change, means and both intervals."""
    rng = np.random.default_rng(0)
    draw: Any = lambda p: Run((rng.random(400) < p).astype(int).tolist())  # noqa: E731
    results: Any = {
        "contrastive": {0: draw(0.3), 1: draw(0.3), 2: draw(0.3)},
        "better": {0: draw(0.7), 1: draw(0.7), 2: draw(0.7)},
        "halted": {1: draw(0.7)},
    }
    better, halted = compare_mixes(results, [("a/zero_shot", "acc1")], list(results))
    assert better.verdict == "helps"
    assert better.paired is not None
    assert better.over_samples is not None
    assert better.over_samples[0] < better.paired.mean < better.over_samples[1]
    theirs = scipy.stats.ttest_rel(better.values, better.baseline)
    assert better.paired.p_value == pytest.approx(theirs.pvalue)
    words = sentence(better)
    for part in ("better, a/zero_shot acc1: helps: +", "points, from ", "over 3 seeds", "over 400 samples"):
        assert part in words
    assert (halted.seeds, halted.verdict) == ((1,), "too few runs")
    assert "1 finished in pairs" in sentence(halted)


def test_metrics_without_outcomes_have_no_interval_over_samples() -> None:
    """The calibration error is no mean over samples."""
    results: Any = {name: {s: Run([0, 1, 1]) for s in (0, 1)} for name in ("contrastive", "same")}
    (found,) = compare_mixes(results, [("a/zero_shot", "calibration_error")], list(results))
    assert (found.samples, found.over_samples) == (None, None)
    assert found.verdict == "no difference"
    assert "no difference that 2 runs each can show" in sentence(found)


def test_the_sentence_names_what_is_too_few() -> None:
    """Seeds, samples or both: whichever interval contains 0."""
    paired = paired_t([0.02, 0.021, 0.019])
    unsure = paired_t([0.02, -0.05, 0.06])
    for used, over, words in (
        (paired, (-0.01, 0.05), "no difference that 40 samples can show"),
        (unsure, (0.005, 0.02), "no difference that 3 runs each can show"),
        (unsure, (-0.01, 0.03), "no difference that 3 runs each and 40 samples can show"),
    ):
        verdict = decide("acc1", used, over)
        values = ((0.1, 0.1, 0.1), (0.12, 0.12, 0.12))
        assert words in sentence(MixComparison("mix", "a", "acc1", (0, 1, 2), *values, used, 40, over, verdict))


def test_holm_counts_all_comparisons() -> None:
    """One clear difference among nothing stays; of many weak ones none does."""

    def results(gains: list[list[float]]) -> Any:
        def run(value: float) -> Any:
            made = Run([0, 1])
            made.results = {"a/zero_shot": {"mean_per_class_recall": value}}
            return made

        base = {"contrastive": {s: run(0.3) for s in range(3)}}
        return base | {f"mix{i}": {s: run(0.3 + g) for s, g in enumerate(gain)} for i, gain in enumerate(gains)}

    def holds(gains: list[list[float]]) -> list[bool]:
        made = results(gains)
        found: list[MixComparison] = compare_mixes(made, [("a/zero_shot", "mean_per_class_recall")], list(made))
        assert all(c.paired is not None and math.isfinite(c.paired.p_value) for c in found)
        return [c.holds_after_holm for c in found]

    assert holds([[0.1, 0.1001, 0.0999], [0.1, -0.1, 0.02]]) == [True, False]
    weak = [0.010, 0.014, 0.020]
    assert holds([weak]) == [True]
    assert holds([weak] * 8) == [False] * 8


@pytest.mark.parametrize(("exported", "end"), [(20, 0.4), (10, 0.3)])
def test_the_end_of_a_run_is_its_last_step(exported: int, end: float, tmp_path: Path) -> None:
    """With early stopping, results.json is about the exported best step; the end is then the last evaluation."""
    rows = [{"step": n, "seconds": 6.0 * n, "fraction": n / 40, "contrastive.loss": 1.0} for n in range(1, 21)]
    seen = [{"step": n, "seconds": 6.0 * n, "results": {"a": {"acc1": v}}} for n, v in ((10, 0.4), (20, 0.3))]
    for name, lines in (("metrics", rows), ("evaluations", seen)):
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (tmp_path / "results.json").write_text(json.dumps({"a": {"acc1": 0.4}}))
    (tmp_path / "best.json").write_text(json.dumps({"exported_step": exported}))
    used = {"peak_memory_bytes": 1, "peak_gpu_memory_bytes": None, "device": "CPU", "threads": 1}
    (tmp_path / "finished.json").write_text(json.dumps(used))
    settings = SimpleNamespace(data=SimpleNamespace(batch_size=8))
    run = SimpleNamespace(
        seed=0, run_dir=tmp_path, record=tmp_path / "finished.json", is_finished=True, config=settings
    )
    mix = SimpleNamespace(name="m", objectives={"contrastive": {}})
    plan: Any = SimpleNamespace(
        mixes=[SimpleNamespace(mix=mix, runs=[run], costs=SimpleNamespace(of=lambda active, fraction: 2.0))]
    )
    found = read_runs(plan)["m"][0]
    assert (found.step, found.results["a"]["acc1"]) == (20, end)
    assert [e.minutes for e in found.evaluations] == [1.0, 2.0]
    assert found.cost.operations == 20 * 8 * 2.0
