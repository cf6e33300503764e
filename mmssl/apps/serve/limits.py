"""What a server gives at most, so that no request costs much memory or time."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ServerLimits:
    """Caps on what a request may hold and on how many are in hand."""

    upload_bytes: int = 10 << 20
    """Largest body of a request."""
    pixels: int = 25_000_000
    """Largest image, width times height. A PNG of the default size takes up to 0.45 GB while it is decoded; one
    image is decoded at a time."""
    elongation: int = 20
    """Longer side over shorter side: the shorter is brought to the model's, and the longer grows with it."""
    scans: int = 100
    """Passes of a progressive JPEG over its pixels; ten are usual. A scan may take a few bytes and the time of a whole
    image."""
    text_chars: int = 300
    """Longest text, label or prompt."""
    labels: int = 100
    """Labels of one request."""
    hits: int = 100
    """Images found by one request."""
    requests: int = 32
    """Requests in hand at once, uploads that still arrive included; more are told to come back."""
    maps: int = 2
    """Similarity maps wanted at once, the one in the making included; each takes hundreds of forward passes."""
    body_seconds: float = 20.0
    """Time in which a request's body must have arrived."""
    answer_seconds: float = 60.0
    """Time that an answer may take once the body is there."""
    hosts: tuple[str, ...] = ()
    """Names under which the server is reached, beside addresses and localhost."""
