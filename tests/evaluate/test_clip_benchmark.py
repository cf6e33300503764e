"""clip_benchmark's own evaluation, driving our encoder through a few lines of adapter, gives our numbers."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
from torch import Tensor

from mmssl.evaluate.classifiers import logistic_regression as probe
from mmssl.evaluate.datasets import Dataset, class_templates, open_dataset, read
from mmssl.evaluate.encode import EncodedImages, class_weights, encode_images, encode_texts
from mmssl.evaluate.labels import class_indices, image_captions
from mmssl.evaluate.metrics import ranking
from mmssl.evaluate.tasks import retrieval, zero_shot
from mmssl.types import Sample
from tests.helpers.toy_encoder import ToyEncoder


@pytest.fixture(autouse=True)
def one_element_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    """clip_benchmark 1.6.2 calls `float` on arrays of one element, which NumPy allows no more."""

    def to_float(value: Any) -> float:
        return value.item() if isinstance(value, np.ndarray) else float(value)

    monkeypatch.setattr(zeroshot_classification, "float", to_float, raising=False)


class Adapter:
    """Our encoder as clip_benchmark's model and tokenizer; tensors hold the places of images and texts."""

    def __init__(self, encoder: Any, images: Sequence[bytes]) -> None:
        self.encoder = encoder
        self.images = images
        self.texts: list[str] = []

    def encode_image(self, numbers: Tensor) -> Tensor:
        return self.encoder.encode_image([self.images[i] for i in numbers.tolist()])

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        self.texts.extend(texts)
        return torch.arange(len(self.texts) - len(texts), len(self.texts))

    def encode_text(self, numbers: Tensor) -> Tensor:
        return self.encoder.encode_text([self.texts[i] for i in numbers.tolist()])


class Loader:
    """Batches of image numbers and targets, with the attributes that clip_benchmark asks for."""

    def __init__(self, targets: Sequence[Any], classes: Sequence[str] | None) -> None:
        self.targets = targets
        self.classes = classes
        self.dataset = self

    def __iter__(self) -> Iterator[tuple[Tensor, Any]]:
        for start in range(0, len(self.targets), 7):
            targets = self.targets[start : start + 7]
            yield (
                torch.arange(start, start + len(targets)),
                torch.tensor(targets) if self.classes else targets,
            )


def load(dataset: Dataset, encoder: Any) -> tuple[list[Sample], EncodedImages]:
    """The samples with their bytes, and their features."""
    samples = list(read(dataset, on_bad=pytest.fail))
    return samples, encode_images(encoder, samples, batch_size=16)


def theirs_classification(dataset: Dataset, encoder: Any, samples: Sequence[Sample]) -> dict[str, float]:
    classnames, labels = class_indices(dataset, samples)
    assert isinstance(dataset.templates, tuple)
    adapter = Adapter(encoder, [s.image for s in samples])
    return zeroshot_classification.evaluate(
        adapter,
        Loader(labels.tolist(), classnames),
        adapter.tokenize,
        classnames,
        list(dataset.templates),
        "cpu",
        amp=False,
    )


def classify(dataset: Dataset, encoder: ToyEncoder, images: EncodedImages) -> dict[str, float]:
    """Our metrics of zero-shot classification."""
    names, labels = class_indices(dataset, images.samples)
    weights = class_weights(encoder, names, class_templates(dataset))
    return zero_shot.classify(images.features, weights, labels, names).metrics


# scikit-learn warns that a predicted class has no sample, which is intended here.
@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
@pytest.mark.parametrize("classes", [3, 5, 7])
@pytest.mark.parametrize("noise", [0.0, 1.0, 4.0])
def test_zero_shot_classification_is_clip_benchmarks(numbers: Path, classes: int, noise: float) -> None:
    """acc1, acc5 and mean_per_class_recall agree to 1e-6, also below 5 classes and with an empty class."""
    dataset = open_dataset(numbers)
    encoder = ToyEncoder(noise=noise)
    samples, _ = load(dataset, encoder)
    samples = [s for s in samples if s.fields["cls"] < classes]
    assert dataset.classnames is not None
    dataset = open_dataset(numbers, classnames=dataset.classnames[:classes])
    ours = classify(dataset, encoder, encode_images(encoder, samples))
    theirs = theirs_classification(dataset, encoder, samples)
    for name, value in theirs.items():
        if math.isnan(value):
            assert name not in ours
        else:
            assert ours[name] == pytest.approx(value, abs=1e-6), name
    assert noise > 0 or ours["acc1"] == 1.0
    assert noise < 4 or ours["acc1"] < 1.0


def test_equal_scores_are_clip_benchmarks() -> None:
    """Classes with equal scores are ranked as by clip_benchmark: accuracies and recall agree to 1e-6. The scores are
    given, because matrix products of some processors round equal columns differently."""
    g = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 3, (200, 7), generator=g).float()
    labels = torch.randint(0, 7, (200,), generator=g)
    found = ranking.best_classes(scores, 5)
    expected = zeroshot_classification.accuracy(scores, labels, topk=(1, 5))
    assert [ranking.top_k_accuracy(found.best, labels, k) for k in (1, 5)] == pytest.approx(expected, abs=1e-6)
    recall = zeroshot_classification.balanced_accuracy_score(labels, scores.argmax(dim=1))
    assert ranking.mean_per_class_recall(found.first, labels) == pytest.approx(recall, abs=1e-6)


def test_the_linear_probe_is_as_good_as_clip_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained on the same features without regularisation, theirs (AdamW) and ours (the minimum, by L-BFGS) agree on
    all but a few of 300 samples. They cannot agree exactly: theirs stops after some epochs, before the minimum."""
    linear_probe = pytest.importorskip("clip_benchmark.metrics.linear_probe")
    # It asks for a GPU in places.
    monkeypatch.setattr(torch.nn.Module, "cuda", lambda self: self)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(5, 16, generator=g)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(0, 5, (count,), generator=g)
        rows = centres[labels] + 1.5 * torch.randn(count, 16, generator=g)
        return torch.nn.functional.normalize(rows, dim=1), labels

    (train, labels), (test, true) = draw(600), draw(300)
    batches = [(train[i : i + 100], labels[i : i + 100]) for i in range(0, 600, 100)]
    model = linear_probe.train(batches, 16, 5, 0.0, 0.1, 60, False, "cpu", 0)
    theirs, _ = linear_probe.infer(model, [(test, true)], False, "cpu")
    ours = probe.fit(train, labels, 5, 100.0).scores(test)
    right = [float((scores.argmax(1) == true).double().mean()) for scores in (ours, theirs)]
    assert right[0] == pytest.approx(right[1], abs=0.02)
    assert (ours.argmax(1) == theirs.argmax(1)).double().mean() > 0.96


@pytest.mark.parametrize("noise", [0.0, 1.0, 4.0])
def test_retrieval_is_clip_benchmarks(captioned: Path, noise: float) -> None:
    """Recall at 1, 5 and 10 in both directions agrees to 1e-6, with 1 to 3 captions an image."""
    dataset = open_dataset(captioned)
    encoder = ToyEncoder(noise=noise)
    samples, embedded = load(dataset, encoder)
    captions = [image_captions(sample) for sample in embedded.samples]
    owner = torch.tensor([image for image, lines in enumerate(captions) for _ in lines])
    texts = encode_texts(encoder, [line for lines in captions for line in lines])
    ours = retrieval.search(embedded.features, texts, owner).metrics
    adapter = Adapter(encoder, [s.image for s in samples])
    loader = Loader([image_captions(s) for s in samples], None)
    theirs = zeroshot_retrieval.evaluate(adapter, loader, adapter.tokenize, "cpu", amp=False, recall_k_list=[1, 5, 10])
    assert len(theirs) == 6
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, abs=1e-6), name
    assert noise > 0 or ours["image_retrieval_recall@1"] == ours["text_retrieval_recall@1"] == 1.0
    assert noise < 4 or ours["text_retrieval_recall@1"] < 0.9
