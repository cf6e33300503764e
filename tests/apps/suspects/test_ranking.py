"""The ranking of suspects, against planted errors and against loops."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mmssl.apps.suspects import rank_samples, ranking


def clusters(count: int, classes: int, seed: int) -> tuple[Tensor, Tensor, list[str]]:
    """Images and captions as noisy copies of their class's direction, and the classes."""
    random = torch.Generator().manual_seed(seed)
    centres = F.normalize(torch.randn(classes, 24, generator=random), dim=1)
    kinds = [i % classes for i in range(count)]
    images, texts = (
        F.normalize(centres[kinds] + 0.1 * torch.randn(count, 24, generator=random), dim=1) for _ in range(2)
    )
    return images, texts, [f"class {kind}" for kind in kinds]


@pytest.mark.parametrize("error", ["caption", "label"])
def test_planted_errors_come_first(error: str) -> None:
    """Twelve samples with the caption, or the label, of another class are the twelve first of 300."""
    images, texts, labels = clusters(300, 6, seed=1)
    wrong = list(range(0, 300, 25))
    captions = [f"{label}, {i}" for i, label in enumerate(labels)]
    for i in wrong:  # one class further
        if error == "caption":
            texts[i] = texts[i + 1]
            captions[i] = f"again {captions[i + 1]}"
        else:
            labels[i] = labels[i + 1]
    found = rank_samples(images, texts, captions, labels)
    assert sorted(suspect.row for suspect in found[:12]) == wrong
    if error == "label":
        assert {suspect.row: suspect.neighbours_label for suspect in found[:12]} == {i: f"class {i % 6}" for i in wrong}


@pytest.mark.parametrize("with_labels", [True, False])
@pytest.mark.parametrize("count", [1, 2, 40])
def test_evidence_against_loops(count: int, with_labels: bool) -> None:
    """Each number is that of a loop over all pairs; captions that occur twice are one rival and never their own."""
    images, texts, labels = clusters(count, 3, seed=2)
    texts[count // 2] = texts[0]
    captions = [f"caption {i}" for i in range(count)]
    captions[count // 2] = captions[0]
    found = rank_samples(images, texts, captions, labels if with_labels else None, neighbours=4)
    assert sorted(suspect.row for suspect in found) == list(range(count))
    assert [s.suspicion for s in found] == sorted((s.suspicion for s in found), reverse=True)
    similarity = (images @ texts.T).numpy()
    for suspect in found:
        i = suspect.row
        assert suspect.similarity == pytest.approx(similarity[i, i], abs=1e-6)
        rivals = {captions[j]: similarity[i, j] for j in range(count) if captions[j] != captions[i]}
        better = np.mean([value > similarity[i, i] for value in rivals.values()]) if rivals else 0.0
        assert suspect.better_captions == pytest.approx(better)
        near = sorted((j for j in range(count) if j != i), key=lambda j: -float(images[i] @ images[j]))[:4]
        assert suspect.nearest == (near[0] if near else i)
        if with_labels and near:
            agree = np.mean([labels[j] == labels[i] for j in near])
            assert suspect.neighbours_agree == pytest.approx(agree)
            assert suspect.suspicion == pytest.approx((better + 1 - agree) / 2)
        if not with_labels:
            assert suspect.neighbours_agree is None
            assert suspect.suspicion == pytest.approx(better)


def test_the_graph_finds_the_neighbours_of_the_comparison_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the graph of large sets, 2,000 samples have the evidence of the exact ranking: 99 % of their nearest images,
    their agreement to 0.01 on average, and the planted wrong labels first; the work is reported."""
    images, texts, labels = clusters(2000, 6, seed=3)
    captions = [f"{label}, {i}" for i, label in enumerate(labels)]
    wrong = list(range(0, 2000, 200))
    for i in wrong:
        labels[i] = labels[i + 1]
    expected = {suspect.row: suspect for suspect in rank_samples(images, texts, captions, labels)}
    monkeypatch.setattr(ranking, "GRAPH_FROM", 2000)
    reports: list[tuple[str, int]] = []
    ranked = rank_samples(images, texts, captions, labels, progress=lambda *now: reports.append(now))
    found = {suspect.row: suspect for suspect in ranked}
    assert np.mean([found[row].nearest == expected[row].nearest for row in range(2000)]) >= 0.99
    agreement = [(found[row].neighbours_agree or 0) - (expected[row].neighbours_agree or 0) for row in range(2000)]
    assert np.abs(agreement).mean() < 0.01
    assert sorted(suspect.row for suspect in ranked[:10]) == wrong
    assert [found[row].better_captions for row in range(2000)] == [expected[row].better_captions for row in range(2000)]
    assert reports == [("images compared", 0), ("images compared", 1024)]
