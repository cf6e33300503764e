"""A calibration against simulations, scikit-learn and torchmetrics-like loops, and through the command."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

import mmssl
from mmssl import MMSSL
from mmssl.apps.calibrate import Trials, calibrate, fit, measure, trials_of
from mmssl.apps.calibrate.fit import over_halves, split
from mmssl.apps.calibrate.measure import Measurement
from mmssl.errors import UserError
from mmssl.evaluate import open_dataset, suite
from mmssl.evaluate.metrics import ranking
from mmssl.evaluate.metrics.calibration import fit_scale
from mmssl.inference import zero_shot
from mmssl.inference.probabilities import Calibration
from tests.cli.test_main import fails, main_ok
from tests.helpers.export_models import own
from tests.helpers.images import photo
from tests.helpers.toy_encoder import ToyEncoder, pack, paint

OPTIONS = suite.SuiteOptions(draw=False)


def drawn(seed: int, count: int = 2000, candidates: int = 20, scale: float = 40.0) -> Trials:
    """Trials in which the right candidate is drawn from softmax(scale * similarity), so that these probabilities are
    calibrated."""
    g = torch.Generator().manual_seed(seed)
    similarities = 0.15 + 0.06 * torch.randn(count, candidates, generator=g)
    return Trials("drawn", similarities, torch.multinomial((scale * similarities).softmax(1), 1, generator=g)[:, 0])


def test_a_calibration_holds_on_other_samples() -> None:
    """Fitted on 2,000 simulated images and measured on 4,000 others: the slope of the logits is the true factor, each
    calibration error is below 0.03 though that of the model's own factor is above 0.1, and both coverages are within 2
    points of 90 %."""
    found = fit(drawn(0))
    assert found.label_scale * math.exp(found.label_curve * 0.15) == pytest.approx(40, rel=0.05)
    metrics = measure(found, drawn(1, 4000), logit_scale=100.0)
    assert metrics["label_calibration_error_before"] > 0.1
    for name in ("label_calibration_error", "match_calibration_error", "known_calibration_error"):
        assert metrics[name] < 0.03, name
    for name in ("label_coverage", "match_coverage"):
        assert metrics[name] == pytest.approx(0.9, abs=0.02), name
        low, high = metrics["intervals"][name]
        assert low < metrics[name] < high
    assert metrics["samples"] == 4000


def test_images_that_are_not_recognised_are_no_reason_for_doubt_of_others() -> None:
    """Where the right label of half of the images is no closer than the others, temperature scaling (the softmax
    with the likeliest factor) has a calibration error above 0.07; that of the fitted curve is below 0.05."""
    parts = []
    for seed in (0, 1):
        g = torch.Generator().manual_seed(seed)
        similarities = 0.1 + 0.08 * torch.randn(4000, 20, generator=g)
        right = torch.randint(20, (4000,), generator=g)
        similarities[torch.arange(2000), right[:2000]] += 0.15
        parts.append(Trials("half", similarities, right))
    mine, others = parts
    error = measure(fit(mine), others, 40.0)["label_calibration_error"]
    scaled = (fit_scale(mine.similarities, mine.right) * others.similarities.double()).softmax(1)
    best = scaled.max(dim=1)
    alone = ranking.expected_calibration_error(best.values, best.indices == others.right)
    assert alone > 0.07
    assert error < 0.05


def test_the_metrics_are_those_of_a_loop() -> None:
    """Calibration error, coverage, labels per image, passed mismatches and AUROC are those of loops."""
    trials = drawn(2, 300, 6)
    found = fit(trials, 0.8)
    metrics = measure(found, trials, 40.0)
    right, sizes, passed, scores = [], [], [], []
    for row, label in zip(trials.similarities.double().tolist(), trials.right.tolist(), strict=True):
        logits = [found.label_scale * (math.exp(found.label_curve * s) - 1) / found.label_curve for s in row]
        total = sum(math.exp(logit) for logit in logits)
        chances = [math.exp(logit) / total for logit in logits]
        right.append(chances[label] >= found.label_threshold - 1e-9)
        sizes.append(sum(p >= found.label_threshold - 1e-9 for p in chances))
        passed += [s >= found.match_threshold for place, s in enumerate(row) if place != label]
        others = [logit for place, logit in enumerate(logits) if place != label]
        scores.append([math.log(np.mean(np.exp(part))) for part in (logits, others)])
    assert metrics["label_coverage"] == pytest.approx(np.mean(right))
    assert metrics["labels_per_image"] == pytest.approx(np.mean(sizes))
    assert metrics["mismatches_passed"] == pytest.approx(np.mean(passed), abs=2e-3)
    known, unknown = np.array(scores).T
    truth = np.repeat([1, 0], len(known))
    assert metrics["unknown_auroc"] == pytest.approx(roc_auc_score(truth, [*known, *unknown]), abs=1e-9)
    confidence, best = found.label_probabilities(trials.similarities).max(1)
    expected = ranking.expected_calibration_error(confidence, best == trials.right)
    assert metrics["label_calibration_error"] == pytest.approx(expected)


def test_halves_share_no_image_and_average_out() -> None:
    """An image is in exactly one half; the means over 40 halves are those of separate fits and measurements; and the
    mean coverages are within 1.5 points of 90 %, though single halves of 100 images are up to 5 points off."""
    trials = drawn(3, 200)
    places = Trials("places", torch.arange(200.0)[:, None], torch.zeros(200, dtype=torch.int64))
    mine, others = (half.similarities[:, 0].tolist() for half in split(places, 5))
    assert sorted(mine + others) == list(range(200))
    assert len(mine) == len(others) == 100
    found = over_halves(trials, 0.9, 40.0, range(40))
    alone = [measure(fit(a), b, 40.0) for a, b in (split(trials, seed) for seed in range(3))]
    three = over_halves(trials, 0.9, 40.0, range(3))
    for name in ("label_calibration_error", "match_coverage", "unknown_auroc"):
        assert three[name] == pytest.approx(np.mean([metrics[name] for metrics in alone])), name
    for name in ("label_coverage", "match_coverage"):
        assert found[name] == pytest.approx(0.9, abs=0.015), name
        low, high = found["intervals"][name]
        assert low < 0.88 < 0.92 < high
    assert found["halves"] == 40


def test_perfect_probabilities_have_the_error_that_is_stated() -> None:
    """A calibration with the true factor has the stated error of perfect probabilities on average over 400 data sets of
    150 images, and that is above 0.05: so few images show such an error even if nothing is wrong."""
    true = fit(drawn(4)).model_copy(update={"label_scale": 40.0, "label_curve": 0.0})
    found = [over_one(true, drawn(100 + seed, 150)) for seed in range(400)]
    errors, stated = np.mean(found, axis=0)
    assert errors == pytest.approx(stated, rel=0.04)
    assert errors > 0.05


def over_one(calibration: Calibration, trials: Trials) -> tuple[float, float]:
    """The calibration error of labels, and the one that perfect probabilities would show."""
    measurement = Measurement(calibration, trials, 40.0)
    perfect = measurement.perfect()["label_calibration_error_perfect"]
    return measurement.values(np.arange(len(trials.right)))["label_calibration_error"], perfect


def toy(logit_scale: float = 60.0, noise: float = 2.0) -> ToyEncoder:
    """The toy encoder with a factor that is far too large for its noise."""
    encoder = ToyEncoder(noise=noise)
    encoder.logit_scale = logit_scale  # type: ignore[attr-defined]
    return encoder


def test_trials_are_the_similarities_of_images_and_candidates(tmp_path: Path) -> None:
    """By labels, a trial has an image's cosines with the class vectors; by captions, its own caption comes first and
    the others are different ones of other samples, equal words being one caption."""
    words = [f"thing {n}" for n in range(8)]
    records = [
        {"png": paint(n % 8, n), "cls": n % 8, "txt": f"{'Thing' if n < 8 else 'thing'}  {n % 8}"} for n in range(40)
    ]
    shard = pack(tmp_path / "0.tar", records)
    encoder = toy()
    dataset = open_dataset(str(shard), classnames=words, templates=("{c}",))
    found = trials_of(encoder, dataset, options=OPTIONS)  # type: ignore[arg-type]
    images = torch.cat([encoder.encode_image([paint(n % 8, n)]) for n in range(40)])
    expected = images @ encoder.encode_text(words).T
    torch.testing.assert_close(found.similarities, expected, atol=1e-6, rtol=0)
    assert found.right.tolist() == [n % 8 for n in range(40)]
    pairs = trials_of(encoder, dataset, "captions", OPTIONS)  # type: ignore[arg-type]
    assert pairs.similarities.shape == (40, 8)
    captions = images @ encoder.encode_text([f"Thing  {n}" for n in range(8)]).T
    for n, (row, own_cosine) in enumerate(zip(pairs.similarities, pairs.own(), strict=True)):
        assert float(own_cosine) == pytest.approx(float(captions[n, n % 8]), abs=1e-6)
        torch.testing.assert_close(row.sort().values, captions[n].sort().values, atol=1e-6, rtol=0)


def test_too_few_or_unsuitable_images_are_refused(tmp_path: Path) -> None:
    """Fewer images than a fit and a measurement need, and fewer than three candidates, are an error that says so."""
    few = pack(tmp_path / "few.tar", [{"png": paint(n), "txt": f"thing {n}"} for n in range(30)])
    with pytest.raises(UserError, match="30 usable images; .* needs 100"):
        calibrate(toy(), open_dataset(str(few)), options=OPTIONS)  # type: ignore[arg-type]
    alike = pack(tmp_path / "alike.tar", [{"png": paint(n), "txt": f"thing {n % 2}"} for n in range(120)])
    with pytest.raises(UserError, match="2 different captions"):
        calibrate(toy(), open_dataset(str(alike)), options=OPTIONS)  # type: ignore[arg-type]


def test_a_calibration_is_better_than_the_models_own_factor(tmp_path: Path) -> None:
    """On a noisy encoder whose factor is too large, the labels' calibration error falls to a fraction, and unknown
    images are told from known ones better than by chance."""
    records = [{"png": paint(n % 30, n % 256), "cls": n % 30} for n in range(600)]
    shard = pack(tmp_path / "0.tar", records)
    names = [f"thing {n}" for n in range(30)]
    dataset = open_dataset(str(shard), classnames=names, templates=("{c}",))
    metrics = calibrate(toy(120.0), dataset, options=OPTIONS).metrics  # type: ignore[arg-type]
    assert metrics["label_calibration_error"] < 0.7 * metrics["label_calibration_error_before"]
    assert metrics["intervals"]["unknown_auroc"][0] > 0.5


def test_a_stored_calibration_decides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command stores it in the model's folder, where `load` finds it: probabilities have the fitted factor, the
    verdict is the closed form of the stored numbers, `match` is the sigmoid of the cosines, and JSON and table of
    `predict` show it. A model that is saved without one removes it."""
    folder, out = tmp_path / "model", tmp_path / "metrics.json"
    own().save(folder)
    shard = pack(tmp_path / "0.tar", [{"png": paint(257 * n), "txt": f"a square {n}"} for n in range(120)])
    main_ok(["calibrate", str(folder), str(shard), "--no-cache", "--halves", "3", "--json", str(out)])
    printed = capsys.readouterr().out
    assert printed.count("match_coverage") == 2
    assert "mean over 3 halves" in printed
    assert "calibration.json" in printed
    stored = json.loads((folder / "calibration.json").read_text())
    assert stored == json.loads(out.read_text())
    model, image, labels = mmssl.load(folder), photo(32, 32), ["red", "green", "blue square"]
    cosines = (model.encode_image(image) @ model.encode_text(labels).T)[0].double()
    found = model.classify(image, labels)
    k, curve = stored["label_scale"], stored["label_curve"]
    bent = [(math.exp(curve * c) - 1) / curve for c in cosines.tolist()]
    expected = dict(zip(labels, (k * torch.tensor(bent)).softmax(0).tolist(), strict=True))
    assert found == pytest.approx(expected, abs=1e-6)
    matches = torch.sigmoid(stored["match_scale"] * cosines + stored["match_bias"])
    assert found.verdict is not None
    assert found.verdict.matches == pytest.approx(dict(zip(labels, matches.tolist(), strict=True)), abs=1e-6)
    torch.testing.assert_close(MMSSL(folder).match(image, labels)[0], matches, atol=1e-6, rtol=0)
    familiarity = math.log(sum(math.exp(k * c) for c in bent) / 3) / k
    none = 1 / (1 + math.exp(stored["known_scale"] * familiarity + stored["known_bias"]))
    assert found.verdict.none == pytest.approx(none, abs=1e-6)
    assert found.verdict.likely == [label for label, p in found.items() if p >= stored["label_threshold"]]
    photo(32, 32).save(tmp_path / "a.png")
    asked = ["predict", str(folder), str(tmp_path / "a.png"), "--labels", ",".join(labels)]
    main_ok([*asked, "--precision", "fp32", "--json"])
    (record,) = json.loads(capsys.readouterr().out)
    assert record["none_of_these"] == pytest.approx(none, abs=1e-5)
    assert record["likely"] == found.verdict.likely
    main_ok(asked)
    assert "none of these" in capsys.readouterr().out
    model.calibration = None
    model.save(folder)
    assert not (folder / "calibration.json").exists()
    assert mmssl.load(folder).classify(image, labels).verdict is None
    with pytest.raises(UserError, match="mmssl calibrate"):
        mmssl.load(folder).match(image, labels)


@pytest.mark.parametrize("damage", ["{", "[]", '{"format": 2}', '{"format": 1, "label_scale": 1e999}'])
def test_a_damaged_calibration_is_named(tmp_path: Path, damage: str) -> None:
    """A file that is no calibration is refused in one line that names it."""
    own().save(tmp_path)
    (tmp_path / "calibration.json").write_text(damage)
    with pytest.raises(UserError, match=r"calibration.json is damaged .*; remove it"):
        mmssl.load(tmp_path)


def test_the_command_refuses_what_it_cannot_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model of another library needs a folder for the result."""
    fails(["calibrate", "open_clip:ViT-S-32-alt", "x/*.tar"], capsys, "--out FOLDER")


def test_models_without_calibration_say_nothing_more() -> None:
    """Predictions of a model that is not calibrated have no verdict."""
    assert zero_shot(own(), ["a", "b"])([photo(9, 9)])[0].verdict is None
