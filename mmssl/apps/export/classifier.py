"""A fine-tuned classifier as ONNX: classifier.onnx, from images to probabilities, and its labels."""

import copy
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from mmssl.apps.export.sample import images, needs
from mmssl.apps.export.to_onnx import export_graph
from mmssl.apps.finetune.classifier import Classifier
from mmssl.errors import UserError
from mmssl.models.dual_encoder import DualEncoder

GRAPH, LABELS = "classifier.onnx", "labels.json"
TOLERANCE = 1e-5
"""Probabilities of onnxruntime may differ by so much from ours."""


def write_classifier(classifier: Classifier, folder: Path) -> float:
    """Write classifier.onnx ("images", uint8 [N, 3, S, S] -> "probabilities" [N, C]) and labels.json, a list of C.

    Returns: the largest difference between onnxruntime's probabilities and ours on a few images.

    Raises:
        UserError: a package is missing, or they differ by more than TOLERANCE; nothing is left then.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise needs("onnxruntime", error) from None
    module = _Probabilities(classifier)
    batch = torch.export.Dim("batch", min=1, max=2**16)
    export_graph(module, (images(classifier.model),), ["images"], ({0: batch},), folder / GRAPH, "probabilities")
    pixels = images(classifier.model, 5)
    session = onnxruntime.InferenceSession(str(folder / GRAPH), providers=["CPUExecutionProvider"])
    theirs = torch.from_numpy(session.run(["probabilities"], {"images": pixels.numpy()})[0])
    ours = classifier.logits(classifier.model.encode_rendered(pixels)).softmax(dim=1)
    difference = float((theirs - ours).abs().max())
    if not difference <= TOLERANCE:
        (folder / GRAPH).unlink()
        raise UserError(f"as ONNX its probabilities differ by {difference:.2g}, so they were not written; report this")
    (folder / LABELS).write_text(json.dumps(classifier.labels, indent=1, ensure_ascii=False), encoding="utf-8")
    return difference


class _Probabilities(nn.Module):
    weight: Tensor
    bias: Tensor

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.encoder: DualEncoder = copy.deepcopy(classifier.model.encoder).to("cpu").eval()
        self.register_buffer("weight", classifier.weight)
        self.register_buffer("bias", classifier.bias)

    def forward(self, images: Tensor) -> Tensor:
        return (self.encoder.encode_image(images) @ self.weight.T + self.bias).softmax(dim=1)
