"""Metrics as functions of tensors, independent of models, datasets and files."""

from mmssl.evaluate.metrics import classification, embedding, groups, ranking

__all__ = ["classification", "embedding", "groups", "ranking"]
