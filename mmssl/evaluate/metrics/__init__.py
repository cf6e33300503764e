"""Metrics as functions of tensors; nothing here knows models, datasets or files."""

from mmssl.evaluate.metrics import classification, embedding, groups, ranking

__all__ = ["classification", "embedding", "groups", "ranking"]
