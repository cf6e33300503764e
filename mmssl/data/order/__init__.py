"""Order: the sequence of the training samples, computed from integers. Nothing here reads a file."""

from mmssl.data.order.batching import Batching, DistinctValues, NeighbourGroups
from mmssl.data.order.epoch import Slices, default_slice_bytes, shuffled
from mmssl.data.order.plan import Mixture, PlannedSource, Position, SampleRun, StreamPlan, default_lanes

__all__ = [
    "Batching",
    "DistinctValues",
    "Mixture",
    "NeighbourGroups",
    "PlannedSource",
    "Position",
    "SampleRun",
    "Slices",
    "StreamPlan",
    "default_lanes",
    "default_slice_bytes",
    "shuffled",
]
