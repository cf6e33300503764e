"""Metrics as functions of tensors; nothing here knows models, data sets or files."""

from mmssl.evaluate.metrics import classification, embedding, groups, ranking

__all__ = ["classification", "embedding", "groups", "ranking"]
