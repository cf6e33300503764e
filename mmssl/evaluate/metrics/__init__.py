"""Metrics as functions of tensors, independent of models, datasets and files."""

from mmssl.evaluate.metrics import (
    baselines,
    calibration,
    classification,
    clustering,
    composed,
    embedding,
    groups,
    neighbours,
    novelty,
    pairs,
    ranking,
    segmentation,
)

__all__ = [
    "baselines",
    "calibration",
    "classification",
    "clustering",
    "composed",
    "embedding",
    "groups",
    "neighbours",
    "novelty",
    "pairs",
    "ranking",
    "segmentation",
]
