"""Loading: batches prepared ahead of time by threads or processes."""

from mmssl.data.loading.parts import PartBuilder, PartTask, Render
from mmssl.data.loading.pipeline import BadSampleBudget, PartJoiner, Pipeline, Tokenize
from mmssl.data.loading.unindexed import NO_INDEX_WARNING, UnindexedBuilder, UnindexedPlan, unindexed_lanes
from mmssl.data.loading.workers import split_tasks

__all__ = [
    "NO_INDEX_WARNING",
    "BadSampleBudget",
    "PartBuilder",
    "PartJoiner",
    "PartTask",
    "Pipeline",
    "Render",
    "Tokenize",
    "UnindexedBuilder",
    "UnindexedPlan",
    "split_tasks",
    "unindexed_lanes",
]
