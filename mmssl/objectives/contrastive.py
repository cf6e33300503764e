"""Symmetric InfoNCE between pictures and captions (CLIP, Radford et al. 2021, figure 3)."""

import torch

from mmssl.distributed import Processes
from mmssl.losses.contrastive import info_nce
from mmssl.models.dual_encoder import DualEncoder
from mmssl.objectives.base import (
    CLEAN_IMAGE,
    CLEAN_TEXT,
    Features,
    Forward,
    Inputs,
    Objective,
    ObjectiveOptions,
    Output,
    Predictions,
    Vocabulary,
)

ACCURACY_ROWS = 512
"""Accuracy in the batch is measured on this many pictures, so that it costs nothing beside the loss."""


class Contrastive(Objective):
    """Each picture picks its caption among all of the global batch, and each caption its picture."""

    coupled = True

    def __init__(self, options: ObjectiveOptions, encoder: DualEncoder, vocabulary: Vocabulary) -> None:
        super().__init__()

    def forwards(self) -> tuple[Forward, ...]:
        return CLEAN_IMAGE, CLEAN_TEXT

    def predict(self, features: Features, inputs: Inputs, encoder: DualEncoder) -> Predictions:
        return {
            "image": encoder.project_image(features[CLEAN_IMAGE].pooled),
            "text": encoder.project_text(features[CLEAN_TEXT].pooled),
            "logit_scale": encoder.logit_scale,
        }

    def loss(self, predictions: Predictions, inputs: Inputs, processes: Processes) -> Output:
        image, text, scale = (predictions[k] for k in ("image", "text", "logit_scale"))
        total = info_nce(image, text, scale, ranks=processes)
        with torch.no_grad():
            rows = image[:ACCURACY_ROWS]
            texts, offset = processes.gather(text)
            hits = (rows @ texts.T).argmax(1) == torch.arange(offset, offset + len(rows), device=rows.device)
        return Output(total, {"accuracy": (hits.sum(), len(rows)), "logit_scale": (scale.detach(), 1.0)})
