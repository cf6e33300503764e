"""Classifiers from few labels: their start, their training, and the metrics of the written folder."""

from pathlib import Path

import pytest
import torch

from mmssl import Model, load
from mmssl.apps.finetune import FineTuneData, FineTuneSettings, LabelOptions, fine_tune, gather, load_classifier
from mmssl.apps.finetune.methods import METHODS, Method
from mmssl.data import iter_samples
from mmssl.errors import UserError
from mmssl.evaluate.classifiers import fine_tuning as tuning

FAST = {"rates": (1e-3,), "epochs": 2}


@pytest.fixture(autouse=True)
def _few_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "STEPS", 4)


@pytest.mark.parametrize("method", METHODS)
def test_the_folder_gives_the_figures_that_were_printed(
    method: Method, model: Model, problem: FineTuneData, colors: Path, tmp_path: Path
) -> None:
    """Better than zero-shot; evaluated image by image from its folder the classifier has the accuracy it reports; the
    text tower and the model that was started from stay as they were."""
    before = {name: value.clone() for name, value in model.encoder.state_dict().items()}
    tuned = fine_tune(model, problem, FineTuneSettings(method, shots=8, **FAST))
    metrics = tuned.metrics()
    assert metrics["acc1"] > metrics["zero_shot"] + 0.2
    assert metrics["acc1_interval"][0] <= metrics["acc1"] <= metrics["acc1_interval"][1]
    assert metrics["train_samples"] == 32
    assert metrics["test_samples"] == 40
    tuned.classifier.save(tmp_path / "classifier")
    again = load_classifier(tmp_path / "classifier")
    assert again.labels == ["red", "green", "blue", "white"]
    samples = list(iter_samples([str(colors / "test" / "0.tar")], need_text=False))
    predictions = again.predict([sample.image for sample in samples])
    right = [next(iter(found)) == sample.fields["colour"] for found, sample in zip(predictions, samples, strict=True)]
    assert sum(right) / len(right) == metrics["acc1"]
    assert all(torch.equal(value, before[name]) for name, value in model.encoder.state_dict().items())
    whole = load(tmp_path / "classifier").encoder.state_dict()
    changed = {name for name, value in whole.items() if not torch.equal(value, before[name])}
    assert all(name.startswith(("vision.", "image_projection.")) for name in changed)
    assert bool(changed) == (method != "linear")
    assert again.record["method"] == method
    assert again.record["figures"]["acc1"] == metrics["acc1"]


@pytest.mark.parametrize("method", METHODS)
def test_alpha_0_is_zero_shot(method: Method, model: Model, problem: FineTuneData) -> None:
    """With alpha 0 nothing of the training is left: zero-shot's answer for every image, and the model's own tower."""
    tuned = fine_tune(model, problem, FineTuneSettings(method, shots=4, alpha=0.0, **FAST))
    assert tuned.before is not None
    assert (tuned.after == tuned.before).all()
    old, new = model.encoder.state_dict(), tuned.classifier.model.encoder.state_dict()
    assert all(torch.equal(value, old[name]) for name, value in new.items())


def test_the_same_seed_gives_the_same_classifier(model: Model, problem: FineTuneData) -> None:
    """Labels drawn, their order and the weights: all from the seed."""
    first, same, other = (
        fine_tune(model, problem, FineTuneSettings("lp-ft", shots=2, seed=seed, **FAST)).classifier
        for seed in (3, 3, 4)
    )
    assert torch.equal(first.weight, same.weight)
    assert not torch.equal(first.weight, other.weight)


def test_classes_without_names_begin_at_zero(model: Model, flat: Path, colors: Path) -> None:
    """Numbers as labels: no zero-shot figure, labels are the numbers, and a mix with zero-shot is refused."""
    problem = gather(model, str(flat), label_options=LabelOptions(label="cls"))
    assert not problem.named
    tuned = fine_tune(model, problem, FineTuneSettings("linear"))
    assert tuned.before is None
    assert "zero_shot" not in tuned.metrics()
    assert tuned.classifier.labels == ["0", "1", "2", "3"]
    with pytest.raises(UserError, match="--classnames"):
        fine_tune(model, problem, FineTuneSettings("linear", alpha=0.5))
    named = gather(model, str(colors))
    (start,) = {tuple(head.weights.shape) for head in [named.zero_shot(model)] if head is not None}
    assert start == (4, model.config.embed_dim)


def test_shards_without_a_test_split_keep_a_fifth(model: Model, flat: Path, colors: Path) -> None:
    """A fifth of each class is judged and never trained on, and that is said; --test names other shards; names come
    from a JSON field."""
    problem = gather(model, str(flat), label_options=LabelOptions(label="colour"), seed=1)
    shown, kept = ({sample.id for sample in part.samples} for part in (problem.train, problem.test))
    assert not shown & kept
    assert shown | kept == set(range(48))
    assert torch.bincount(problem.test.labels).tolist() == [2, 2, 2, 2]
    assert problem.classnames == ("blue", "green", "red", "white")
    assert "8 of 48 samples are held out for testing" in problem.notes[0]
    tested = gather(model, str(flat), label_options=LabelOptions(label="colour"), test=str(colors / "test" / "*.tar"))
    assert (len(tested.train.labels), len(tested.test.labels), tested.notes) == (48, 40, [])
    fine = fine_tune(model, problem, FineTuneSettings("full", **FAST))
    assert fine.metrics()["test_samples"] == 8


def test_too_few_samples_are_named(model: Model, problem: FineTuneData, flat: Path) -> None:
    """More labels than a class has are refused with the class."""
    with pytest.raises(UserError, match=r"'red' has 12 images to train on, 13 are needed"):
        fine_tune(model, problem, FineTuneSettings("linear", shots=13))
