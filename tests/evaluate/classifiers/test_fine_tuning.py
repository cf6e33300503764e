"""Training a tower with its head, choosing the learning rate, and the weights between two models."""

import pytest
import torch
from sklearn.metrics import balanced_accuracy_score
from torch.nn import functional as F

from mmssl.evaluate.classifiers import fine_tuning as tuning
from mmssl.evaluate.classifiers.fine_tuning import EPOCHS, HeadedTower, Labelled, TuneOptions, mix_weights, train, tune
from mmssl.rng import torch_generator
from tests.helpers.random_towers import Tower


@pytest.fixture
def shown() -> Labelled:
    """Twenty noisy images and their classes."""
    generator = torch_generator("noise")
    images = torch.randint(0, 256, (20, 3, 4, 4), generator=generator, dtype=torch.uint8)
    return images, torch.randint(0, 3, (20,), generator=generator)


def headed() -> HeadedTower:
    return HeadedTower(Tower(), torch.randn(3, 8, generator=torch_generator("head")), 5.0).eval()


def test_mixing_is_exact_at_the_ends() -> None:
    """Alpha 0 and 1 give the weights of either end to the bit, 1/2 their mean; counters stay."""
    start, end = Tower().state_dict(), {n: torch.randn_like(w.float()) for n, w in Tower().state_dict().items()}
    assert all(torch.equal(w, start[n]) for n, w in mix_weights(start, end, 0.0).items())
    whole = mix_weights(start, end, 1.0)
    assert all(torch.equal(w, end[n]) for n, w in whole.items() if w.is_floating_point())
    assert torch.equal(whole["layers.2.num_batches_tracked"], start["layers.2.num_batches_tracked"])
    torch.testing.assert_close(
        mix_weights(start, end, 0.5)["layers.0.bias"], (start["layers.0.bias"] + end["layers.0.bias"]) / 2
    )


def test_training_is_adamw_on_cross_entropy(shown: Labelled, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one batch a step, the weights are those of torch's AdamW driven by hand; batch norms keep statistics."""
    monkeypatch.setattr(tuning, "STEPS", 1)
    model, expected = headed(), headed()
    train(model, shown, 1e-2, TuneOptions())
    optimizer = torch.optim.AdamW(expected.parameters(), lr=1e-2, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    images, labels = shown
    for _ in range(EPOCHS):
        optimizer.zero_grad()
        features = F.normalize(expected.tower(images), dim=-1)
        F.cross_entropy(5.0 * features @ expected.head.T + expected.bias, labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected.state_dict()[name], rtol=1e-4, atol=1e-5)
    assert torch.equal(model.state_dict()["tower.layers.2.running_mean"], torch.zeros(32))
    assert float(model.bias.detach().abs().max()) > 0


def test_the_rate_that_is_best_on_held_out_images_is_taken(shown: Labelled) -> None:
    """Held out are the images trained on: 1e-9 learns nothing, 1e-2 learns them. The weights left are its own, and
    each rate began anew; without held-out images the first rate is taken."""
    model, alone = headed(), headed()
    assert tune(model, shown, shown, TuneOptions(rates=(1e-9, 1e-2))) == 1e-2
    train(alone, shown, 1e-2, TuneOptions())
    assert all(torch.equal(value, alone.state_dict()[name]) for name, value in model.state_dict().items())
    nothing = shown[0][:0], shown[1][:0]
    assert tune(headed(), shown, nothing, TuneOptions(rates=(1e-9, 1e-2))) == 1e-9


def test_with_balance_rare_classes_count_alike(shown: Labelled) -> None:
    """By class, the accuracy is the mean of sklearn's recalls and the likelihood the mean of those of each class.
    Balanced tuning leaves a head that always names the frequent class."""
    images, labels = shown[0], torch.tensor([0] * 16 + [1, 1, 2, 2])
    model = headed()
    with torch.no_grad():
        scores = model(images)
    accuracy, likelihood = tuning.quality(model, (images, labels), by_class=True)
    assert accuracy == pytest.approx(balanced_accuracy_score(labels, scores.argmax(1)))
    own = scores.log_softmax(1).gather(1, labels[:, None])[:, 0]
    expected = sum(float(own[labels == number].mean()) for number in range(3)) / 3
    assert likelihood == pytest.approx(expected, rel=1e-5)

    def outcome(head: HeadedTower, by_class: bool) -> float:
        return tuning.quality(head, (images, labels), by_class)[0]

    always = HeadedTower(Tower(), torch.zeros(3, 8), 5.0, torch.tensor([1.0, 0.0, 0.0])).eval()
    assert outcome(always, False) == 0.8
    assert outcome(always, True) == pytest.approx(1 / 3)
    prior = torch.tensor([0.8, 0.1, 0.1]).log()
    options = TuneOptions(rates=(1e-9, 1e-2), log_prior=prior)
    tuned = HeadedTower(Tower(), torch.zeros(3, 8), 5.0, torch.tensor([1.0, 0.0, 0.0])).eval()
    tune(tuned, (images, labels), (images, labels), options)
    assert outcome(tuned, True) > outcome(always, True) + 0.1
