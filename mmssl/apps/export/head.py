"""The head of a fine-tuned classifier beside an exported model: its weights and its labels."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from mmssl.apps.export.reader import images, png_files
from mmssl.evaluate import encode

if TYPE_CHECKING:
    from mmssl.apps.finetune import Classifier

HEAD, LABELS = "head.safetensors", "labels.json"
Classify = Callable[[Sequence[bytes]], Tensor]
"""The bytes of N image files -> the probabilities of C labels, [N, C], as another library computes them."""


def usage(folder: str, features: str = "features") -> str:
    """Python code that classifies features.

    Args:
        features: code of the unit vectors of images, a tensor [N, D].
    """
    return f"""import json, pathlib
from safetensors.torch import load_file
head, labels = load_file("{folder}/{HEAD}"), json.loads(pathlib.Path("{folder}/{LABELS}").read_text("utf-8"))
probabilities = ({features} @ head["weight"].T + head["bias"]).softmax(-1)  # [N, labels]"""


def write_head(classifier: "Classifier", folder: Path, theirs: encode.Encoder, **more: Tensor) -> Classify:
    """Write head.safetensors (weight [C, D], bias [C] and `more`) and labels.json, a list of C."""
    save_file({"weight": classifier.weight, "bias": classifier.bias, **more}, folder / HEAD)
    write_labels(classifier, folder)
    return lambda images: classifier.logits(theirs.encode_image(images)).softmax(-1)


def write_labels(classifier: "Classifier", folder: Path) -> None:
    """Write labels.json, a list."""
    (folder / LABELS).write_text(json.dumps(classifier.labels, indent=1, ensure_ascii=False), encoding="utf-8")


@torch.no_grad()
def largest_difference(classifier: "Classifier", classify: Classify) -> float:
    """The largest absolute difference of the probabilities of random images."""
    files = png_files(images(classifier.model))
    return float((classify(files) - classifier.probabilities(files)).abs().max())
