"""Zero-shot classification: the texts of labels classify images."""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from torch import Tensor

from mmssl.errors import UserError
from mmssl.evaluate import encode, prompts
from mmssl.evaluate.metrics import classification
from mmssl.inference.images import ImageInput
from mmssl.inference.probabilities import Calibration, LabelProbabilities, decide

Classify = Callable[[Sequence[ImageInput]], list[LabelProbabilities]]
"""Images -> for each image label -> probability."""


class ImageTextEncoder(Protocol):
    """What a zero-shot classifier needs of a model."""

    @property
    def logit_scale(self) -> float:
        """Factor from cosine similarities to logits."""
        ...

    @property
    def calibration(self) -> Calibration | None:
        """Probabilities fitted on held-out pairs, if there are any."""
        ...

    def encode_image(self, images: Sequence[ImageInput]) -> Tensor:
        """Unit vectors [N, D]."""
        ...

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors [N, D]."""
        ...


def zero_shot(
    model: ImageTextEncoder,
    labels: str | Iterable[str],
    templates: prompts.Templates = ("{c}",),
    *,
    numbered: bool = False,
) -> Classify:
    """Zero-shot classification, with labels and templates checked.

    Args:
        templates: texts with `{c}` for the label; with several, their mean vector is used.
        numbered: labels may be repeated, as two of ImageNet's are; these get their numbers appended in the results.

    Raises:
        UserError: labels are missing, empty or repeated, or a template lacks `{c}`.
    """
    texts = [labels] if isinstance(labels, str) else list(labels)
    names = check_labels(list(classification.distinct(texts)) if numbered else texts)
    return ZeroShotClassifier(model, texts, _check_templates(templates), names)


class ZeroShotClassifier:
    """Classifies images by the texts of labels."""

    def __init__(
        self,
        model: ImageTextEncoder,
        labels: Sequence[str],
        templates: prompts.Templates = ("{c}",),
        names: Sequence[str] | None = None,
    ) -> None:
        """Args:
        names: names of the labels in the results. None: the labels themselves.
        """
        self._model = model
        self.labels = list(labels if names is None else names)
        self.weights = encode.class_weights(model, list(labels), templates)
        """Unit vectors of the labels, [C, D]."""

    def __call__(self, images: Sequence[ImageInput]) -> list[LabelProbabilities]:
        similarities = self._model.encode_image(images) @ self.weights.T
        return decide(self.labels, similarities, self._model.logit_scale, self._model.calibration)


def check_labels(labels: Sequence[str]) -> list[str]:
    """Labels as a list of different texts.

    Raises:
        UserError: labels are missing, empty or repeated.
    """
    names = [labels] if isinstance(labels, str) else list(labels)
    double = next((name for place, name in enumerate(names) if name in names[:place]), None)
    wrong = next((name for name in names if not isinstance(name, str)), None)
    if wrong is not None:
        raise UserError(f"expected labels as texts, found a {type(wrong).__name__}: {str(wrong)[:40]}")
    if not names or any(not name.strip() for name in names) or double is not None:
        problem = f"label {double!r} is repeated" if double is not None else "labels are missing or empty"
        raise UserError(f"{problem}; give each once, for example: cat, dog")
    return names


def _check_templates(templates: prompts.Templates) -> prompts.Templates:
    if isinstance(templates, tuple) and not all("{c}" in template for template in templates):
        raise UserError(f"template {next(t for t in templates if '{c}' not in t)!r} has no {{c}} for the label")
    return templates
