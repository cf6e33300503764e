"""Order: the sequence of the training samples, computed from integers. Nothing here reads a file."""

from mmssl.data.order.epoch import Slices, default_slice_bytes, shuffled
from mmssl.data.order.plan import (
    STATE_VERSION,
    Mixture,
    PlannedSource,
    Position,
    SampleRun,
    StreamPlan,
    check_lanes,
    default_lanes,
)

__all__ = [
    "STATE_VERSION",
    "Mixture",
    "PlannedSource",
    "Position",
    "SampleRun",
    "Slices",
    "StreamPlan",
    "check_lanes",
    "default_lanes",
    "default_slice_bytes",
    "shuffled",
]
