"""Order: the sequence of the training samples, computed from integers. Nothing here reads a file."""

from mmssl.data.order.plan import PlannedSource, Position, StreamPlan, default_lanes

__all__ = ["PlannedSource", "Position", "StreamPlan", "default_lanes"]
