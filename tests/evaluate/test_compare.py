"""Comparisons of two models against SciPy and against enumeration."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mmssl.errors import UserError
from mmssl.evaluate import suite
from mmssl.evaluate.compare import Difference, compare, compare_draws, compare_results, significant, verdicts
from mmssl.evaluate.console import format_differences
from mmssl.evaluate.datasets import open_dataset
from mmssl.files import read_csv
from mmssl.rng import generator
from mmssl.stats import holm, mcnemar, sign_flip
from tests.helpers.toy_encoder import ToyEncoder, pack, paint


@settings(deadline=None)
@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_binomial_test(gained: int, lost: int) -> None:
    """The exact p-value is SciPy's two-sided binomial test with probability 1/2."""
    expected = stats.binomtest(gained, gained + lost).pvalue if gained + lost > 0 else 1.0
    assert mcnemar(gained, lost) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_of_many_samples() -> None:
    """Fifty thousand changed samples overflow nothing."""
    assert mcnemar(25_400, 24_600) == pytest.approx(stats.binomtest(25_400, 50_000).pvalue, rel=1e-6)


def test_sign_flips_are_what_all_of_them_give() -> None:
    """The sampled p-value is near that of all 2^10 sign patterns."""
    change = generator(1).normal(0.4, size=10)
    sums = [abs(np.dot(signs, change)) for signs in itertools.product((-1, 1), repeat=10)]
    expected = np.mean([s >= abs(change.sum()) - 1e-12 for s in sums])
    assert sign_flip(change) == pytest.approx(expected, abs=0.015)


def test_equal_models_do_not_differ() -> None:
    """A model compared with itself has no difference, p = 1, and an interval that allows for as many changes as
    SciPy's Wilson interval of 0 of 50 does."""
    values = generator(2).random(50)
    found = compare(values, values)
    assert (found.difference, found.p_value) == (0.0, 1.0)
    most = stats.binomtest(0, 50).proportion_ci(method="wilson").high
    assert found.interval == pytest.approx((-most, most))


def test_a_real_gain_is_found_and_a_small_one_is_not() -> None:
    """Thirty of 200 samples gained and none lost is real; three gained and two lost is not."""
    first = np.zeros(200)
    better, alike = first.copy(), first.copy()
    better[:30] = 1
    alike[:3] = 1
    second = compare(first, better)
    assert second.difference == pytest.approx(0.15)
    assert second.interval[0] > 0.09
    assert second.p_value < 1e-8
    first[3:5] = 1
    assert compare(first, alike).p_value == pytest.approx(1.0)
    assert compare(first, alike).interval[0] < 0 < compare(first, alike).interval[1]


def test_holm_by_hand() -> None:
    """Of p = 0.01, 0.04, 0.03, 0.2 at 5 %: 0.01 <= 0.05/4 is real, 0.03 > 0.05/3 stops the rest."""
    assert holm([0.01, 0.04, 0.03, 0.2]) == [True, False, False, False]
    assert holm([0.01, 0.015, 0.02, 0.05]) == [True, True, True, True]
    assert holm([]) == []


def test_results_of_two_models_are_compared(numbers: Path, captioned: Path, tmp_path: Path) -> None:
    """The figures read from the folders are those that were reported, and the better model wins them."""
    data = {"n": (numbers, "zero_shot"), "c": (captioned, "retrieval")}
    results = [
        suite.run(ToyEncoder(noise=noise), data, tmp_path / name, suite.SuiteOptions(draw=False))
        for name, noise in (("good", 0.5), ("bad", 4.0))
    ]
    found = compare_results(tmp_path / "bad", tmp_path / "good")
    assert len(found) == 8
    for name, difference in found.items():
        key, _, figure = name.rpartition("/")
        if "image_retrieval" not in figure:
            assert (difference.second, difference.first) == pytest.approx([r[key][figure] for r in results])
    assert found["n/zero_shot/acc1"].p_value < 0.01
    assert found["c/retrieval/text_retrieval_recall@1"].interval[0] > 0
    for name in ("good", "bad"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / name).rename(tmp_path / "runs" / name / "later")
    below = compare_results(tmp_path / "runs" / "bad", tmp_path / "runs" / "good")
    assert below == {f"later/{name}": difference for name, difference in found.items()}
    table = format_differences(found).splitlines()
    assert [line for line in table if "/" in line] == ["c/retrieval", "n/zero_shot"]
    row = next(line for line in table if line.startswith("acc1 "))
    assert row.endswith("*")
    assert max(map(len, table)) <= 80


def test_a_image_counts_once_however_many_captions_it_has(tmp_path: Path) -> None:
    """Captions of one image are averaged before models are compared."""
    for name, rank in (("a", 1), ("b", 7)):
        folder = tmp_path / name / "x" / "retrieval"
        folder.mkdir(parents=True)
        rows = [("0.tar", "k0", "text", "", 1), ("0.tar", "k1", "text", "", 1)]
        rows += [("0.tar", "k0", "image", "one", rank), ("0.tar", "k0", "image", "two", 1)]
        rows += [("0.tar", "k1", "image", "x", 1)]
        lines = [",".join(map(str, row)) for row in [("shard", "key", "retrieval", "caption", "place"), *rows]]
        (folder / "ranks.csv").write_text("\n".join(lines))
    found = compare_results(tmp_path / "a", tmp_path / "b")["x/retrieval/image_retrieval_recall@5"]
    assert (found.first, found.second) == (1.0, 0.75)


def test_equal_scores_and_long_captions(tmp_path: Path) -> None:
    """Captions that occur twice tie with each other: what is compared are the hits that were reported. A caption of
    200,000 letters is read back."""
    records = [{"png": paint(100 + i // 2, i), "txt": f"{'w' * 200_000} number {100 + i // 2}"} for i in range(6)]
    shard = pack(tmp_path / "twice-0.tar", records)
    found = suite.run(ToyEncoder(), {"r": (shard, "retrieval")}, tmp_path / "a", suite.SuiteOptions(draw=False))[
        "r/retrieval"
    ]
    assert found["text_retrieval_recall@1"] > 0
    both = compare_results(tmp_path / "a", tmp_path / "a")
    for k in (1, 5):
        assert both[f"r/retrieval/text_retrieval_recall@{k}"].first == found[f"text_retrieval_recall@{k}"]


def test_images_of_shards_with_one_name_are_two(tmp_path: Path) -> None:
    """Shards of one name in two folders, with the same keys inside, hold different images."""
    for number, folder in enumerate("xy"):
        pack(
            tmp_path / folder / "0.tar",
            [{"png": paint(100 + i + 9 * number), "txt": f"number {100 + i}"} for i in range(9)],
        )
    shards = [str(tmp_path / folder / "0.tar") for folder in "xy"]
    data = {"r": (open_dataset(shards), "retrieval")}
    found = suite.run(ToyEncoder(), data, tmp_path / "a", suite.SuiteOptions(draw=False))["r/retrieval"]
    both = compare_results(tmp_path / "a", tmp_path / "a")
    name = "text_retrieval_recall@1"
    assert both[f"r/retrieval/{name}"].first == found[name]


def test_classes_of_one_name_are_two(tmp_path: Path) -> None:
    """An image taken for another class of the same name is wrong in the comparison too, as it was reported."""
    shard = pack(tmp_path / "t-0.tar", [{"png": paint(100 + i % 2, i), "cls": 2 * (i % 2)} for i in range(20)])
    names = ["number 100", "number 101", "number 101"]
    data = open_dataset(shard, classnames=names, templates=("{c}",))
    found = suite.run(ToyEncoder(), {"n": (data, "zero_shot")}, tmp_path / "a", suite.SuiteOptions(draw=False))[
        "n/zero_shot"
    ]
    assert found["acc1"] == 0.5
    assert compare_results(tmp_path / "a", tmp_path / "a")["n/zero_shot/acc1"].first == 0.5
    rows = read_csv(tmp_path / "a" / "n" / "zero_shot" / "per_class.csv")
    assert [row["class"] for row in rows] == ["number 100", "number 101 (1)", "number 101 (2)"]


def test_a_sentence_keeps_the_signs_of_its_interval() -> None:
    """Where the test finds a difference and the interval just touches zero, both are told."""
    d = Difference(0.5, 0.52, (-0.005, 0.045), 0.001)
    assert (
        verdicts({"x": d}, "a", "b")[0] == "x: b is better than a by 2.0 points (-0.5 to 4.5) (significant, p = 0.001)."
    )
    d = Difference(0.52, 0.5, (-0.045, 0.005), 0.001)
    assert "a is better than b by 2.0 points (-0.5 to 4.5)" in verdicts({"x": d}, "a", "b")[0]


def test_a_gain_below_the_most_frequent_class_is_said_to_be_so(tmp_path: Path) -> None:
    """Of two models of which neither reaches the accuracy of the most frequent class, that is said, also where one is
    better than the other; the class frequencies come from the evaluation."""
    d = Difference(0.3, 0.5, (0.1, 0.3), 0.001, baselines={"majority": 0.6, "chance": 0.45})
    assert verdicts({"x": d}, "a", "b")[0].endswith(
        " The better one is no better than the most frequent class (60.0 %)."
    )
    assert "x without the image: majority 60.00 %, chance 45.00 %" in format_differences({"x": d})
    assert "no better" not in verdicts({"x": replace(d, second=0.61)}, "a", "b")[0]
    records = [{"png": paint(100 + (i > 11), i), "cls": int(i > 11)} for i in range(20)]
    data = open_dataset(pack(tmp_path / "t-0.tar", records), classnames=["number 500", "number 501"])
    for name in "ab":
        suite.run(ToyEncoder(noise=9), {"n": (data, "zero_shot")}, tmp_path / name, suite.SuiteOptions(draw=False))
    found = compare_results(tmp_path / "a", tmp_path / "b")["n/zero_shot/acc1"]
    assert found.baselines == {"majority": 0.6, "chance": pytest.approx(0.52)}


def test_draws_are_paired() -> None:
    """The spread is that of the difference over draws, not of the accuracies; a p-value needs three draws, and is not
    smaller than SciPy's paired t-test over the draws allows, however many samples agree."""
    rng = generator("draws")
    first = [(rng.random(400) < level).astype(float) for level in (0.3, 0.5, 0.7)]
    gained = [np.where(rng.random(400) < gain, 1, values) for gain, values in zip((0.1, 0.3, 0.6), first, strict=True)]
    found = compare_draws(first, gained)
    changes = [b.mean() - a.mean() for a, b in zip(first, gained, strict=True)]
    assert found.difference == pytest.approx(np.mean(changes))
    assert found.spread == pytest.approx(np.std(changes, ddof=1))
    expected = stats.ttest_1samp(changes, 0).pvalue
    assert expected > 0.01 > compare(np.mean(first, axis=0), np.mean(gained, axis=0)).p_value
    assert found.p_value == pytest.approx(expected)
    two = compare_draws(first[:2], gained[:2])
    assert (two.p_value, compare_draws(first[:1], gained[:1]).spread) == (None, None)
    assert "too few draws for a test" in verdicts({"x": two}, "a", "b")[0]
    assert significant({"x": two, "y": Difference(0, 1, (1, 1), 0.04)}) == [False, True]


def test_few_shot_differences_are_paired_by_draw(numbers: Path, tmp_path: Path) -> None:
    """`few_shot` writes the accuracy of each draw; the mean over them is the metric, and comparisons show the spread of
    the difference."""
    pack(numbers / "train" / "0.tar", [{"png": paint(100 + i % 6, i + 60), "cls": i % 6} for i in range(30)])
    for name, noise in (("a", 4.0), ("b", 3.0)):
        data = {"n": (numbers, "few_shot")}
        metrics = suite.run(ToyEncoder(noise=noise), data, tmp_path / name, suite.SuiteOptions(draw=False))
        rows = read_csv(tmp_path / name / "n" / "few_shot" / "draws.csv")
        values = [float(row["acc1@2"]) for row in rows]
        assert len(values) == 5
        assert metrics["n/few_shot"]["acc1@2"] == pytest.approx(np.mean(values))
        assert metrics["n/few_shot"]["std@2"] == pytest.approx(np.std(values, ddof=1))
    found = compare_results(tmp_path / "a", tmp_path / "b")["n/few_shot/acc1@2"]
    assert found.spread is not None
    assert found.p_value is not None


def test_columns_are_aligned_whatever_the_script() -> None:
    """Wide letters take two columns of a terminal, marks upon letters none."""
    d = Difference(0.5, 0.52, (-0.005, 0.045), 0.001)
    lines = format_differences({"写真": d, "cafe\u0301s": d, "x": d}).splitlines()
    width = [len(line) + line.count("写") + line.count("真") - line.count("\u0301") for line in lines]
    assert len(set(width)) == 1


def test_results_that_cannot_be_compared(numbers: Path, tmp_path: Path) -> None:
    """Other samples, and nothing in common, are refused."""
    suite.run(ToyEncoder(), {"n": (numbers, "zero_shot")}, tmp_path / "a", suite.SuiteOptions(draw=False))
    with pytest.raises(UserError, match="share no evaluation"):
        compare_results(tmp_path / "a", tmp_path)
    (numbers / "test" / "nshards.txt").write_text("1")
    suite.run(ToyEncoder(), {"n": (numbers, "zero_shot")}, tmp_path / "b", suite.SuiteOptions(draw=False))
    with pytest.raises(UserError, match="have different samples"):
        compare_results(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "n" / "zero_shot" / "predictions.csv").write_text("")
    with pytest.raises(UserError, match=r"predictions\.csv is empty; .* run it again"):
        compare_results(tmp_path / "a", tmp_path / "b")
