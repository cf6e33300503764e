"""Metrics as functions of tensors, independent of models, datasets and files."""

from mmssl.evaluate.metrics import baselines, classification, embedding, groups, ranking

__all__ = ["baselines", "classification", "embedding", "groups", "ranking"]
