"""Order: which sample comes when, as arithmetic. Nothing here reads a file."""

from mmssl.data.order.plan import PlannedSource, Position, StreamPlan, default_lanes

__all__ = ["PlannedSource", "Position", "StreamPlan", "default_lanes"]
