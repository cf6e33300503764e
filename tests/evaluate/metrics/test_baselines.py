"""Baselines against scikit-learn's dummy classifiers, enumeration and loops."""

from itertools import permutations

import numpy as np
import pytest
import torch
from sklearn.dummy import DummyClassifier
from sklearn.metrics import balanced_accuracy_score

from mmssl.evaluate.metrics import baselines
from mmssl.evaluate.tasks import retrieval
from mmssl.rng import generator


@pytest.mark.parametrize("seed", range(3))
def test_baselines_are_scikit_learns_dummies(seed: int) -> None:
    """`majority` is the accuracy of the most frequent class, `chance` that of draws at the class frequencies."""
    labels = generator(seed, "labels").choice(7, 4000, p=[0.4, 0.2, 0.15, 0.1, 0.08, 0.05, 0.02])
    found = baselines.of_classes(torch.from_numpy(labels), ["acc1", "acc1@4", "acc5", "mean_per_class_recall", "c"])
    x = np.zeros((len(labels), 1))
    most = DummyClassifier(strategy="most_frequent").fit(x, labels).score(x, labels)
    draws = [DummyClassifier(strategy="stratified", random_state=n).fit(x, labels).predict(x) for n in range(20)]
    assert found["acc1"] == found["acc1@4"]
    assert found["acc1"]["majority"] == pytest.approx(most)
    assert found["acc1"]["chance"] == pytest.approx(np.mean([d == labels for d in draws]), abs=0.005)
    recalls = [balanced_accuracy_score(labels, d) for d in draws]
    assert found["mean_per_class_recall"]["chance"] == pytest.approx(np.mean(recalls), abs=0.01)
    assert found["acc5"]["majority"] == pytest.approx(np.isin(labels, np.argsort(-np.bincount(labels))[:5]).mean())
    assert "c" not in found


@pytest.mark.parametrize(("right", "k"), [([1, 1], 1), ([1, 2, 3], 2), ([5, 1], 3), ([6], 1)])
def test_recall_by_chance_is_the_mean_over_all_orders(right: list[int], k: int) -> None:
    """Of every order of 6 candidates, the fraction that has a right one among the first k."""
    orders = list(permutations(range(6)))
    expected = np.mean([[min(order.index(c) for c in range(r)) < k for order in orders] for r in right])
    assert baselines.recall_by_chance(np.array(right), 6, k) == pytest.approx(expected)


def test_images_with_the_same_words_count_as_right() -> None:
    """Recalls, ranks and chance are those of a loop in which every image with the words of a caption is right for it,
    and every caption whose words an image has is right for that image; case and spaces do not count."""
    captions = [["a cat"], ["A  cat", "one more"], ["a dog"], ["a cat", "a dog "], ["a bird"], ["a fish", "a FISH"]]
    texts, owner = [t for lines in captions for t in lines], [i for i, lines in enumerate(captions) for _ in lines]
    rng = generator("retrieval")
    images, features = (
        torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(n, 8))).float(), dim=1)
        for n in (len(captions), len(texts))
    )
    found = retrieval.search(images, features, torch.tensor(owner), retrieval.same_words(texts))
    plain = [" ".join(text.lower().split()) for text in texts]
    own = [{plain[c] for c in range(len(texts)) if owner[c] == i} for i in range(len(captions))]
    for word, scores, right in (
        ("image", features @ images.T, [[i for i in range(6) if plain[c] in own[i]] for c in range(len(texts))]),
        ("text", images @ features.T, [[c for c in range(len(texts)) if plain[c] in own[i]] for i in range(6)]),
    ):
        orders = [row.argsort(descending=True).tolist() for row in scores]
        places = [min(map(order.index, rs)) for order, rs in zip(orders, right, strict=True)]
        for k in (1, 5):
            assert found.metrics[f"{word}_retrieval_recall@{k}"] == pytest.approx(np.mean([p < k for p in places]))
        assert found.metrics[f"{word}_retrieval_median_rank"] == np.median(places) + 1
        chance = np.mean([len(rs) / scores.shape[1] for rs in right])
        assert found.baselines[f"{word}_retrieval_recall@1"]["chance"] == pytest.approx(chance)
    assert found.metrics["repeated_captions"] == 5
    different = retrieval.search(images, features, torch.tensor(owner))
    assert "repeated_captions" not in different.metrics
    assert different.baselines["image_retrieval_recall@1"]["chance"] == pytest.approx(1 / 6)
