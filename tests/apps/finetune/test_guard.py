"""Fine-tuning that cannot ruin a model: early stopping, mixtures held to a guard, and classes of unequal sizes."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from mmssl import Model
from mmssl.apps.finetune import FineTuneData, FineTuneSettings, fine_tune, gather
from mmssl.apps.finetune.guard import ALPHAS, open_guard
from mmssl.data import iter_samples
from mmssl.errors import UserError
from mmssl.evaluate import suite
from mmssl.evaluate.classifiers import fine_tuning as tuning
from mmssl.evaluate.classifiers import logistic_regression
from tests.cli.test_main import fails, main_ok

FAST = {"rates": (1e-3,), "epochs": 2}


@pytest.fixture(autouse=True)
def _few_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "STEPS", 10)


@pytest.mark.parametrize("lr", [1e-3, 1.0, 100.0])
def test_training_with_patience_never_ends_worse(lr: float, model: Model, problem: FineTuneData) -> None:
    """Whatever the rate, accuracy and then likelihood on held-out images are those of the best measured weights: never
    worse than at the start, which is kept to the bit if nothing was better. A fitting rate is far better."""
    rows = torch.arange(48)
    shown, held_out = problem.train.render(model, rows[:32]), problem.train.render(model, rows[32:])
    zero = problem.zero_shot(model)
    assert zero is not None
    headed = tuning.attach_head(model, zero.weights.float() / model.logit_scale)
    start, before = headed.weights(), tuning.quality(headed, held_out)
    options = tuning.TuneOptions(patience=2)
    tuning.train(headed, shown, lr, options, held_out=held_out)
    after = tuning.quality(headed, held_out)
    assert after >= before
    same = all(torch.equal(value, start[name]) for name, value in headed.weights().items())
    assert same == (after == before)
    assert after[0] > 0.8 or lr > 1e-3


def relabelled(data: FineTuneData) -> FineTuneData:
    """The same images with wrong labels."""
    return replace(data, train=replace(data.train, labels=(data.train.labels + 1) % 4))


@pytest.fixture
def able(model: Model, problem: FineTuneData) -> Model:
    """A model that knows the colours without a head: its image tower was trained towards the class names."""
    return fine_tune(model, problem, FineTuneSettings("full", rates=(1e-3,), epochs=10)).classifier.model


@pytest.mark.parametrize("method", ["full", "lp-ft"])
@pytest.mark.parametrize("lr", [1e-3, 0.1])
def test_the_guard_is_kept(method: str, lr: float, able: Model, colors: Path) -> None:
    """Trained on wrong labels, a model loses most of its zero-shot accuracy on the right ones; with them as the guard
    it loses 2 points at most, by the alpha that it reports. The guard's accuracy is that of the evaluation."""
    guard = open_guard(able, str(colors), options=suite.SuiteOptions(draw=False))
    data = relabelled(gather(able, str(colors)))
    settings = FineTuneSettings(method, rates=(lr,), epochs=10)  # type: ignore[arg-type]
    guarded = fine_tune(able, data, settings, guard=guard)
    assert guarded.chosen["guard_before"] > 0.8
    assert guarded.chosen["guard_after"] >= guarded.chosen["guard_before"] - 0.02
    assert guarded.chosen["alpha"] in ALPHAS
    plan = {"c": (colors, "zero_shot")}
    found = suite.run(guarded.classifier.model, plan, options=suite.SuiteOptions(draw=False))["c/zero_shot"]
    assert found["acc1"] == pytest.approx(guarded.chosen["guard_after"])
    free = fine_tune(able, data, settings)
    lost = suite.run(free.classifier.model, plan, options=suite.SuiteOptions(draw=False))["c/zero_shot"]
    if lr == 1e-3 and method == "full":  # lp-ft fits wrong labels by the head alone
        assert lost["acc1"] < guarded.chosen["guard_before"] - 0.3
        assert guarded.chosen["alpha"] < 1
    assert guarded.classifier.record["alpha"] == guarded.chosen["alpha"]


def test_a_training_that_was_of_no_use_is_told(model: Model, able: Model, problem: FineTuneData) -> None:
    """At a rate that ruins the weights, those before the training are kept to the bit and that is recorded; a rate that
    fits keeps the trained ones."""
    found = fine_tune(able, problem, FineTuneSettings("full", rates=(1e4,), epochs=2))
    assert found.kept_start
    assert found.metrics()["kept_start"]
    old, new = able.encoder.state_dict(), found.classifier.model.encoder.state_dict()
    assert all(torch.equal(value, old[name]) for name, value in new.items())
    useful = fine_tune(model, problem, FineTuneSettings("full", rates=(1e-3,), epochs=10))
    assert not useful.kept_start
    assert "kept_start" not in useful.metrics()


def test_alpha_auto_is_the_best_on_held_out_labels(model: Model, problem: FineTuneData) -> None:
    """Of the linear heads between zero-shot and fitted, the one that is right most often on held-out labels is used,
    the nearest to zero-shot of equal ones."""
    found = fine_tune(model, problem, FineTuneSettings("linear", shots=4, alpha=None))
    rows = logistic_regression.draw_shots(problem.train.labels, 4, 0)[1]
    features, labels = problem.train.features[rows], problem.train.labels[rows]
    right = []
    for alpha in ALPHAS:
        classifier = fine_tune(model, problem, FineTuneSettings("linear", shots=4, alpha=alpha)).classifier
        right.append(int((classifier.logits(features).argmax(1) == labels).sum()))
    assert found.chosen["alpha"] == ALPHAS[right.index(max(right))]


def test_balanced_regression_is_the_fit_with_adjusted_logits() -> None:
    """At the balanced classifier the gradient of the regularised cross entropy of logits plus log frequencies vanishes,
    by autograd: it is the minimum of that loss. Rare classes are found more often than without."""
    g = torch.Generator().manual_seed(0)
    labels = torch.cat([torch.zeros(150), torch.ones(20), torch.full((10,), 2)]).long()
    centres = F.normalize(torch.randn(3, 6, generator=g), dim=1)
    features = F.normalize(centres[labels] + 0.6 * torch.randn(180, 6, generator=g), dim=1)
    rows = torch.arange(180), torch.arange(0)
    found, c = logistic_regression.probe(features, labels, rows, 3, balance=True)
    weights = found.weights.clone().requires_grad_()
    bias = found.bias.clone().requires_grad_()
    prior = (torch.bincount(labels).double() / 180).log()
    loss = c * F.cross_entropy(features.double() @ weights.T + bias + prior, labels, reduction="sum")
    (loss + weights.square().sum() / 2).backward()
    assert weights.grad is not None
    assert bias.grad is not None
    # Of sums over 180 samples; the solver ends at 1e-7 of their mean, in its own coordinates.
    assert float(weights.grad.abs().max()) < 1e-3
    assert float(bias.grad.abs().max()) < 1e-3
    plain, _ = logistic_regression.probe(features, labels, rows, 3)

    def rare(classifier: logistic_regression.Linear) -> float:
        return float((classifier.scores(features).argmax(1) == labels)[labels > 0].double().mean())

    assert rare(found) > rare(plain) + 0.1


def test_equal_classes_are_trained_alike(model: Model, problem: FineTuneData) -> None:
    """With as many samples of each class, the adjustment is the same for all and changes no weight of full training
    beyond rounding."""
    plain, balanced = (
        fine_tune(model, problem, FineTuneSettings("full", shots=4, balance=balance, **FAST)).classifier
        for balance in (False, True)
    )
    torch.testing.assert_close(plain.weight, balanced.weight, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("names", [["a red thing", "Größe 42 – grün", '青い, "x"', "b"], ["0", "1", "2", "10"]])
def test_labels_of_a_table_are_any_text_or_numbers(
    names: list[str], model_folder: Path, colors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A CSV of images and labels with spaces, commas, quotes and other scripts, or of numbers, gives a classifier with
    these labels."""
    samples = list(iter_samples([str(colors / "train" / "0.tar")], need_text=False))
    with (tmp_path / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "label"])
        for number, sample in enumerate(samples):
            (tmp_path / f"{number}.png").write_bytes(sample.image)
            rows.writerow([f"{number}.png", names[int(sample.fields["cls"])]])
    command = ["finetune", str(model_folder), str(tmp_path / "labels.csv"), "--no-cache", "--balance"]
    main_ok([*command, "--out", str(tmp_path / "out")])
    assert "by class" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "classifier.json").read_text())
    assert sorted(record["labels"]) == sorted(names)
    assert record["balance"] is True
    assert record["figures"]["acc1"] > 0.5


def test_wrong_options_are_named(
    model: Model, model_folder: Path, colors: Path, flat: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An alpha that is no number, a guard for a table, and a guard whose classes have no names are errors."""
    base = ["finetune", str(model_folder), str(colors)]
    fails([*base, "--alpha", "two"], capsys, "--alpha 'two' must be a number from 0 to 1, or auto")
    fails([*base, "--shots", "1,2", "--guard", str(colors)], capsys, "--guard is for one classifier")
    with pytest.raises(UserError, match="no class names"):
        open_guard(model, str(flat))
