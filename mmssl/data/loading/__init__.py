"""Loading: batches prepared ahead of time by threads or processes."""

from mmssl.data.loading.parts import PartBuilder
from mmssl.data.loading.pipeline import BadSampleBudget, Pipeline
from mmssl.data.loading.unindexed import UnindexedBuilder

__all__ = ["BadSampleBudget", "PartBuilder", "Pipeline", "UnindexedBuilder"]
