"""A fine-tuned classifier: a model, and a linear head over its image vectors, in one folder."""

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmssl.errors import UserError
from mmssl.inference import ImageInput, Model, label_probabilities, load

FORMAT = 1
RECORD, HEAD = "classifier.json", "head.safetensors"


class Classifier:
    """Images to probabilities of labels.

    Attributes:
        model: whose image tower sees the images; after full fine-tuning its text tower no longer fits it as before.
        labels: the classes, in the order of the head's rows.
        weight: [C, D]; its products with the model's unit vectors, plus `bias` [C], are logits. Both float32.
        record: how it came about, as JSON holds it: templates, method, figures, version.
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

    def predict(self, images: ImageInput | Sequence[ImageInput], batch_size: int = 256) -> list[dict[str, float]]:
        """Of each image the probability of each label, highest first.

        Args:
            images: one image or a list of them, as `Model.encode_image` takes them.

        Raises:
            UserError: a file cannot be read.
            DecodeError: an image cannot be decoded.
        """
        return label_probabilities(self.labels, self.logits(self.model.encode_image(images, batch_size)))

    def logits(self, features: Tensor) -> Tensor:
        """Of the model's image vectors [N, D], [N, C]."""
        return features @ self.weight.T + self.bias

    def save(self, folder: str | Path) -> None:
        """Write the model's folder, classifier.json and head.safetensors: all that `load_classifier` needs.

        Raises:
            UserError: the folder cannot be written.
        """
        place = Path(folder)
        record = {**self.record, "format": FORMAT, "version": version("mmssl"), "labels": self.labels}
        self.model.save(place)
        try:
            save_file({"weight": self.weight.contiguous(), "bias": self.bias.contiguous()}, place / HEAD)
            (place / RECORD).write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")
        except (OSError, SafetensorError) as error:
            raise UserError(f"the classifier cannot be written to {place}: {error}; pick another folder") from None


def is_classifier(folder: str | Path) -> bool:
    """Whether `Classifier.save` wrote there."""
    return (Path(folder) / RECORD).is_file()


def load_classifier(folder: str | Path) -> Classifier:
    """What `Classifier.save` wrote.

    Raises:
        UserError: there is none, or its files do not fit together.
    """
    place = Path(folder)
    if not is_classifier(place):
        raise UserError(f"no classifier in {place} (it has no {RECORD}); give a folder that mmssl finetune wrote")
    try:
        record = json.loads((place / RECORD).read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise UserError(f"{place} has format {record['format']!r}, this version reads {FORMAT}")
        head = load_file(place / HEAD)
        labels, weight, bias = [str(label) for label in record["labels"]], head["weight"], head["bias"]
    except (ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
        raise UserError(f"{place} is not a classifier of mmssl: {' '.join(str(error).split())[:300]}") from None
    model = load(place)
    if weight.shape != (len(labels), model.config.embed_dim) or bias.shape != (len(labels),):
        raise UserError(f"{place}: {HEAD} does not fit the {len(labels)} labels and the model; write it anew")
    return Classifier(model, labels, weight, bias, record)
