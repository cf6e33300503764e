"""A fine-tuned classifier: a model with a linear head, in one folder; and weights between two models (WiSE-FT).

Interpolation as in Wortsman et al. 2022.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmssl.errors import UserError
from mmssl.evaluate.classifiers import fine_tuning
from mmssl.inference import ImageInput, Model, load, probabilities
from mmssl.models.pretrained import foreign

FORMAT = 1
RECORD, HEAD = "classifier.json", "head.safetensors"


class Classifier:
    """Images to probabilities of labels.

    Attributes:
        model: its image tower encodes the images; after full fine-tuning its text tower no longer fits as before.
        labels: the classes, in the order of the head's rows.
        weight: [C, D]; products with the model's unit vectors plus `bias` [C] are logits. Both float32.
        record: its origin, for classifier.json: templates, method, metrics, version.
        calibration: fitted on its logits by `mmssl calibrate`; None without.
    """

    def __init__(
        self, model: Model, labels: Sequence[str], weight: Tensor, bias: Tensor, record: Mapping[str, Any] | None = None
    ) -> None:
        assert weight.shape == (len(labels), model.config.embed_dim)
        assert bias.shape == (len(labels),)
        self.model = model
        self.labels = list(labels)
        self.weight = weight.float().cpu()
        self.bias = bias.float().cpu()
        self.record = dict(record or {})
        self.calibration: probabilities.Calibration | None = None

    def predict(
        self, images: ImageInput | Sequence[ImageInput], batch_size: int = 256
    ) -> list[probabilities.LabelProbabilities]:
        """The probability of each label for each image, highest first; calibrated also with a `verdict`.

        Args:
            images: one image or a list of them, as `Model.encode_image` takes them.

        Raises:
            UserError: a file cannot be read.
            DecodeError: an image cannot be decoded.
        """
        logits = self.logits(self.model.encode_image(images, batch_size))
        return probabilities.decide(self.labels, logits, 1.0, self.calibration)

    def probabilities(self, images: ImageInput | Sequence[ImageInput], batch_size: int = 256) -> Tensor:
        """The probability of each label for each image, [N, C], in the order of the labels."""
        return self.logits(self.model.encode_image(images, batch_size)).softmax(-1)

    def logits(self, features: Tensor) -> Tensor:
        """Logits [N, C] of the model's image vectors [N, D]."""
        return features @ self.weight.T + self.bias

    def save(self, folder: str | Path) -> None:
        """Write the model's folder, classifier.json and head.safetensors, as `load_classifier` reads them.

        Raises:
            UserError: the folder cannot be written.
        """
        place = Path(folder)
        record = {**self.record, "format": FORMAT, "version": version("mmssl"), "labels": self.labels}
        self.model.save(place)
        try:
            save_file({"weight": self.weight.contiguous(), "bias": self.bias.contiguous()}, place / HEAD)
            (place / RECORD).write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")
            probabilities.write_calibration(place, self.calibration, probabilities.HEAD_FILE)
        except (OSError, SafetensorError) as error:
            raise UserError(f"the classifier cannot be written to {place}: {error}; pick another folder") from None


def is_classifier(folder: str | Path) -> bool:
    """True for a folder written by `Classifier.save`."""
    return (Path(folder) / RECORD).is_file()


def load_classifier(folder: str | Path) -> Classifier:
    """The classifier in a folder written by `Classifier.save`.

    Raises:
        UserError: the folder holds no classifier, or its files do not fit together.
    """
    place = Path(folder)
    if not is_classifier(place):
        raise UserError(f"no classifier in {place} (it has no {RECORD}); give a folder that mmssl finetune wrote")
    with foreign.reading(place, "classifier"):
        record = foreign.read_json(place / RECORD)
        if record["format"] != FORMAT:
            raise UserError(f"{place} has format {record['format']!r}, this version reads {FORMAT}")
        head = load_file(place / HEAD)
        labels, weight, bias = [str(label) for label in record["labels"]], head["weight"], head["bias"]
    model = load(place)
    if weight.shape != (len(labels), model.config.embed_dim) or bias.shape != (len(labels),):
        raise UserError(f"{place}: {HEAD} does not fit the {len(labels)} labels and the model; write it again")
    found = Classifier(model, labels, weight, bias, record)
    found.calibration = probabilities.read_calibration(place, probabilities.HEAD_FILE)
    return found


_SHOWN = 3


def interpolate(first: Model, second: Model, alpha: float) -> Model:
    """The model with the weights (1 - alpha) * first + alpha * second; tokenizer and configuration are the first's.

    Useful where both come from one pretrained model; between models trained apart there is nothing of value.

    Raises:
        UserError: they differ in more than their weights; the message names the differences.
    """
    differences = [*_settings(first, second), *_weights(first, second)]
    if differences:
        shown = "; ".join(differences[:_SHOWN])
        more = f" and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
        raise UserError(
            f"these models differ in more than their weights, so they cannot be interpolated: {shown}{more}"
        )
    encoder = copy.deepcopy(first.encoder)
    others = {name: tensor.to(first.device) for name, tensor in second.encoder.state_dict().items()}
    encoder.load_state_dict(fine_tuning.mix_weights(first.encoder.state_dict(), others, alpha))
    notes = [f"(1 - {alpha:g}) * first + {alpha:g} * second"]
    return Model(encoder, first.tokenizer, first.config, notes)


def interpolate_classifiers(first: Classifier, second: Classifier, alpha: float) -> Classifier:
    """The classifier with the interpolated model and head of two with the same labels.

    Raises:
        UserError: the labels differ, or the models do in more than their weights.
    """
    if first.labels != second.labels:
        pairs = zip_longest(first.labels, second.labels)
        place, (one, two) = next((n, pair) for n, pair in enumerate(pairs, start=1) if pair[0] != pair[1])
        raise UserError(
            f"these classifiers have different labels, so they cannot be interpolated: label {place} is {one!r} in the "
            f"first, {two!r} in the second"
        )
    model = interpolate(first.model, second.model, alpha)
    weight, bias = ((1 - alpha) * a + alpha * b for a, b in ((first.weight, second.weight), (first.bias, second.bias)))
    return Classifier(model, first.labels, weight, bias, {"notes": model.notes})


def _weights(first: Model, second: Model) -> list[str]:
    """Weights that are missing in one of them or differ in shape."""
    one, two = first.encoder.state_dict(), second.encoder.state_dict()
    return [
        f"{name} is {_shape(one.get(name))} in the first, {_shape(two.get(name))} in the second"
        for name in sorted(one.keys() | two.keys())
        if _shape(one.get(name)) != _shape(two.get(name))
    ]


def _settings(first: Model, second: Model) -> list[str]:
    """Differences in settings that leave the shapes of weights alone."""
    one, two = ({**vars(m.view), "statistics": m.vision.statistics, "pooling": m.text.pooling} for m in (first, second))
    found = [f"{key} is {one[key]} in the first, {two[key]} in the second" for key in one if one[key] != two[key]]
    if first.tokenizer.vocabulary != second.tokenizer.vocabulary:
        found.append("the tokenizers have different vocabularies")
    return found


def _shape(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else str(tuple(tensor.shape))
