"""A whole evaluation: what it returns, what it leaves on disk, and what it does with broken data."""

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest

from mmssl.errors import UserError
from mmssl.evaluate import suite
from mmssl.evaluate.console import format_metrics, format_results
from mmssl.evaluate.datasets import class_templates, open_dataset, read
from mmssl.evaluate.encode import class_weights
from mmssl.evaluate.labels import class_indices
from mmssl.evaluate.metrics.ranking import expected_calibration_error
from mmssl.evaluate.suite import default_task
from mmssl.files import write_json
from tests.helpers.toy_encoder import ToyEncoder, pack, paint


def test_a_perfect_model_scores_one(numbers: Path, captioned: Path, tmp_path: Path) -> None:
    """Accuracies and recalls of a perfect model are exactly 1, with Wilson's interval from below, as SciPy computes it;
    results.json holds what is returned."""
    data = {"numbers": (numbers, "zero_shot"), "captioned": (captioned, "retrieval")}
    results = suite.run(ToyEncoder(), data, tmp_path / "out", suite.SuiteOptions(batch_size=16))
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    sure = pytest.approx([binomtest(40, 40).proportion_ci(method="wilson").low, 1.0], abs=1e-3)
    assert results["numbers/zero_shot"] == {
        "acc1": 1.0,
        "acc5": 1.0,
        "mean_per_class_recall": 1.0,
        "classes": 7,
        "samples": 40,
        "intervals": {"acc1": sure, "acc5": sure, "mean_per_class_recall": sure},
        "baselines": {
            "acc1": {"majority": 7 / 40, "chance": pytest.approx((4 * 7**2 + 2 * 6**2) / 40**2)},
            "acc5": {"majority": pytest.approx(34 / 40)},
            "mean_per_class_recall": {"chance": 1 / 6},
        },
    }
    found = results["captioned/retrieval"]
    assert {found[name] for name in found["intervals"]} == {1.0}
    lowest = min(binomtest(n, n).proportion_ci(method="wilson").low for n in (30, 60))
    for name, (low, high) in found["intervals"].items():
        assert high == 1
        assert low == 1 if "rank" in name else lowest - 1e-3 <= low < 1
    assert len(found["intervals"]) == 10
    assert (found["samples"], found["captions"]) == (30, 60)


def test_tables_agree_with_the_figures(numbers: Path, tmp_path: Path) -> None:
    """The per-sample, per-class and confusion tables each give the accuracy that is reported."""
    data = {"n": (numbers, "zero_shot")}
    figures = suite.run(ToyEncoder(noise=2.0), data, tmp_path, suite.SuiteOptions(draw=False, logit_scale=10.0))[
        "n/zero_shot"
    ]
    folder = tmp_path / "n" / "zero_shot"
    texts = {path.stem: path.read_text(encoding="utf-8") for path in folder.iterdir()}
    tables = {name: list(csv.DictReader(io.StringIO(text))) for name, text in texts.items()}
    rows = tables["predictions"]
    assert 0 < figures["acc1"] < 1
    assert np.mean([row["label"] == row["class1"] for row in rows]) == pytest.approx(figures["acc1"])
    in_five = [row["label"] in [row[f"class{n}"] for n in range(1, 6)] for row in rows]
    assert np.mean(in_five) == pytest.approx(figures["acc5"])
    recalls = [float(row["recall"]) for row in tables["per_class"] if row["recall"] != ""]
    assert len(tables["per_class"]) == 7
    assert np.mean(recalls) == pytest.approx(figures["mean_per_class_recall"])
    wrong = sum(int(row["count"]) for row in tables["confusions"])
    assert wrong == round(40 * (1 - figures["acc1"]))
    low, high = figures["intervals"]["calibration_error"]
    assert 0 <= low <= figures["calibration_error"] <= high <= 1


def test_the_calibration_error_is_that_of_bent_logits(numbers: Path) -> None:
    """With a curve, the probabilities are softmax(scale (exp(c s) - 1) / c), computed here from the toy's vectors."""
    encoder = ToyEncoder(noise=2.0)
    options = suite.SuiteOptions(draw=False, logit_scale=10.0, logit_curve=2.0)
    found = suite.run(encoder, {"n": (numbers, "zero_shot")}, None, options)["n/zero_shot"]
    dataset = open_dataset(numbers)
    samples = list(read(dataset))
    names, labels = class_indices(dataset, samples)
    images = encoder.encode_image([sample.image for sample in samples])
    similarities = images @ class_weights(encoder, names, class_templates(dataset)).T
    chances = (10 * ((2 * similarities).exp() - 1) / 2).double().softmax(1).max(1)
    expected = expected_calibration_error(chances.values, chances.indices == labels)
    assert found["calibration_error"] == pytest.approx(expected, abs=1e-5)
    plain = suite.run(encoder, {"n": (numbers, "zero_shot")}, None, suite.SuiteOptions(draw=False, logit_scale=10.0))
    assert plain["n/zero_shot"]["calibration_error"] != pytest.approx(expected, abs=1e-3)


def test_images_are_drawn(numbers: Path, captioned: Path, tmp_path: Path) -> None:
    """Examples, confusions and retrieval grid are PNGs with something on them, for few and many classes."""
    many = [{"png": paint(300 + i, i), "json": {"label": f"$number^ 写 {300 + i}"}} for i in range(40)]
    pack(tmp_path / "many-0.tar", many)
    data: dict[str, Any] = {
        "few": (numbers, "zero_shot"),
        "many": (str(tmp_path / "many-0.tar"), "zero_shot"),
        "search": (captioned, "retrieval"),
    }
    suite.run(ToyEncoder(noise=4.0), data, tmp_path / "out", suite.SuiteOptions(logit_scale=20.0))
    found = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.png"))
    expected = ["few/zero_shot/confused.png", "few/zero_shot/examples.png", "many/zero_shot/confused.png"]
    assert found == [*expected, "many/zero_shot/examples.png", "search/retrieval/retrieval.png"]
    for path in (tmp_path / "out").rglob("*.png"):
        pixels = np.asarray(Image.open(path).convert("RGB"))
        assert min(pixels.shape[:2]) > 200
        assert 0.01 < (pixels != 255).any(axis=2).mean() < 0.9


def test_shards_are_encoded_once_for_all_their_tasks(captioned: Path) -> None:
    """Two tasks on the same shards cost one pass of images, in batches of the given size."""
    records = [{"png": paint(i), "cls": i % 6, "txt": f"number {i}"} for i in range(40)]
    shard = pack(captioned / "both-0.tar", records)
    (captioned / "classnames.txt").write_text("\n".join(f"number {i}" for i in range(6)))
    encoder = ToyEncoder()
    spec = str(shard)
    results = suite.run(
        encoder, {"a": (spec, "zero_shot"), "b": (spec, "retrieval")}, options=suite.SuiteOptions(batch_size=16)
    )
    assert list(results) == ["a/zero_shot", "b/retrieval"]
    assert encoder.calls == [16, 16, 8]


def test_a_broken_image_costs_only_itself(numbers: Path) -> None:
    """An image that cannot be decoded is left out and counted; the others are judged as without it."""
    records: list[dict[str, Any]] = [{"png": paint(100 + i % 6, i), "cls": i % 6} for i in range(10)]
    data = {"x": (numbers, "zero_shot")}
    whole = suite.run(ToyEncoder(noise=2.0), data, options=suite.SuiteOptions(batch_size=4))["x/zero_shot"]
    pack(numbers / "test" / "0.tar", [*records[:3], {"png": b"broken", "cls": 0}, *records[3:]])
    pack(numbers / "test" / "1.tar", [{"png": paint(100 + i % 6, i), "cls": i % 6} for i in range(10, 40)])
    found = suite.run(ToyEncoder(noise=2.0), data, options=suite.SuiteOptions(batch_size=4))["x/zero_shot"]
    assert found == whole | {"bad_samples": 1}


def test_samples_that_cannot_be_used_are_limited_by_share(
    numbers: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Up to the limit they are counted by cause and one of each is named; beyond it the evaluation is refused, with the
    causes and the option. Training splits count too."""
    good = [{"png": paint(100 + i % 6, i), "cls": i % 6} for i in range(30)]
    bad = [{"png": b"broken", "cls": 0}] * 7 + [{"png": paint(100)}] * 4
    pack(numbers / "test" / "0.tar", [*good, *bad])
    data = {"x": (numbers, "zero_shot")}
    found = suite.run(ToyEncoder(), data, options=suite.SuiteOptions(bad_samples=0.11))["x/zero_shot"]
    assert (found["bad_samples"], found["samples"]) == (11, 45)
    assert re.search(r"7 left out: .*0\.tar:00030.*4 left out: it has no label 'cls' or 'label'.*:00037", caplog.text)
    with pytest.raises(UserError, match=r"x/zero_shot: 11 of 56 samples .* limit of 0\.1: 7 left .*bad_samples"):
        suite.run(ToyEncoder(), data, tmp_path / "out")
    assert not (tmp_path / "out" / "x").exists()
    pack(numbers / "test" / "0.tar", good)
    pack(numbers / "train" / "0.tar", [*good, *bad])
    with pytest.raises(UserError, match=r"x \(training split\): 11 of 41 samples"):
        suite.run(ToyEncoder(), {"x": (numbers, "knn")})


def test_bad_data_is_refused_before_it_is_encoded(numbers: Path, tmp_path: Path) -> None:
    """Labels that do not fit, unknown tasks and broken images are errors that leave nothing behind."""
    out = tmp_path / "out"
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write to .*below: .*file is not a writable folder"):
        suite.run(ToyEncoder(), {"x": (numbers, "zero_shot")}, tmp_path / "file" / "below")
    with pytest.raises(UserError, match=r"unknown task 'zeroshot'; .*zero_shot"):
        suite.run(ToyEncoder(), {"x": (numbers, "zeroshot")}, out)
    (numbers / "classnames.txt").write_text("only one\n")
    encoder = ToyEncoder()
    with pytest.raises(UserError, match="does not fit the 1 class names"):
        suite.run(encoder, {"x": (numbers, "zero_shot")}, out)
    assert encoder.calls == []
    with pytest.raises(UserError, match="has no caption"):
        suite.run(encoder, {"x": (numbers, "retrieval")}, out)
    shard = pack(tmp_path / "broken-0.tar", [{"png": b"no image", "json": {"label": "a"}}])
    with pytest.raises(UserError, match=r"no image from .*00000 on could be encoded"):
        suite.run(ToyEncoder(), {"x": (shard, "zero_shot")}, out)
    empty = pack(tmp_path / "empty-0.tar", [])
    with pytest.raises(UserError, match="no sample"):
        suite.run(ToyEncoder(), {"x": (empty, "zero_shot")}, out)
    assert not out.exists()


def test_broken_weights_are_named(numbers: Path) -> None:
    """A model that gives NaN is refused, naming the first such image."""
    encoder = ToyEncoder()
    encoder.table[103] = torch.nan
    with pytest.raises(UserError, match=r"0\.tar:00003 are not finite"):
        suite.run(encoder, {"x": (numbers, "zero_shot")})


def test_broken_texts_are_named(numbers: Path) -> None:
    """A text tower that gives NaN is refused, and takes no class for the best of all."""
    encoder = ToyEncoder()
    encode = encoder.encode_text
    encoder.encode_text = lambda texts: encode(texts) * torch.nan  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"the text 'a number 100' are not finite"):
        suite.run(encoder, {"x": (numbers, "zero_shot")})


def test_class_weights_are_open_clips() -> None:
    """The class vectors are those of open_clip's build_zero_shot_classifier."""
    from open_clip import build_zero_shot_classifier

    encoder = ToyEncoder()
    names = [f"number {i}" for i in range(11)]
    templates = ("a {c}", "a good image of the {c}.", "{c}")

    class Model:
        def encode_text(self, tokens: torch.Tensor, normalize: bool) -> torch.Tensor:
            assert normalize
            return encoder.encode_text([texts[i] for i in tokens.tolist()])

    texts: list[str] = []

    def tokenize(new: list[str]) -> torch.Tensor:
        texts.extend(new)
        return torch.arange(len(texts) - len(new), len(texts))

    theirs = build_zero_shot_classifier(Model(), tokenize, names, [t.replace("{c}", "{}") for t in templates])
    ours = class_weights(encoder, names, templates, batch_size=4)
    torch.testing.assert_close(ours, theirs.T, rtol=0, atol=1e-6)


def test_default_task(numbers: Path, captioned: Path) -> None:
    """A folder says what it is made for."""
    assert default_task(open_dataset(numbers)) == "zero_shot"
    assert default_task(open_dataset(captioned)) == "retrieval"


def test_progress_names_the_data_set(numbers: Path) -> None:
    """The callback hears how many images and texts of which dataset are done."""
    heard: list[tuple[str, int]] = []
    suite.run(
        ToyEncoder(),
        {"x": (numbers, "zero_shot")},
        options=suite.SuiteOptions(batch_size=16, progress=lambda what, done: heard.append((what, done))),
    )
    assert heard == [("x: images", 16), ("x: images", 32), ("x: images", 40), ("x: texts", 14)]


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    """A tree that is no JSON leaves the old file and no other."""
    path = tmp_path / "results.json"
    write_json(path, {"a": 1})
    for tree in ({"a": {1, 2}}, {"a": float("nan")}):
        with pytest.raises((TypeError, ValueError)):
            write_json(path, tree)
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_the_table_shows_percents_and_counts() -> None:
    """One line an evaluation, percent where a figure exists, aligned columns."""
    table = format_results(
        {
            "a/zero_shot": {"acc1": 0.5, "acc5": 1.0, "classes": 10, "samples": 200},
            "long/retrieval": {"image_retrieval_recall@5": 0.25, "samples": 3},
        }
    ).splitlines()
    assert table[0].split() == ["acc1", "acc5", "image_retrieval_recall@5", "classes", "samples"]
    assert table[1].split() == ["a/zero_shot", "50.00", "100.00", "10", "200"]
    assert table[2].split() == ["long/retrieval", "25.00", "3"]
    assert len({len(line) for line in table}) == 1


def test_every_figure_is_shown_with_its_interval() -> None:
    """Rates have four digits and their interval, counts are whole, gaps are in words."""
    gap = {"best": "a", "worst": "b", "width": 0.25, "p_value": 0.001}
    metrics = {
        "acc1": 0.5,
        "samples": 1200,
        "intervals": {"acc1": [0.4, 0.6]},
        "baselines": {"acc1": {"majority": 0.6, "chance": 0.45}},
        "gaps": {"style": gap, "size": None},
    }
    assert format_metrics(metrics) == [
        ("acc1", "0.5000", "0.4000 to 0.6000", "majority 0.6000, chance 0.4500"),
        ("samples", "1,200", "", ""),
        ("gap by style", "0.2500", "p = 0.001, from b to a", ""),
        ("gap by size", "", "no two groups of 10 samples", ""),
    ]
