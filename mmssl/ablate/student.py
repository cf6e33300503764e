"""Student's t distribution for whole degrees of freedom (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4)."""

import math


def central_probability(t: float, degrees: int) -> float:
    """Probability that |T| < t, for t >= 0 and at least one degree of freedom."""
    return _central(math.atan(t / math.sqrt(degrees)), degrees)


def quantile(level: float, degrees: int) -> float:
    """The t with probability `level` (0 to 1) that |T| < t, by bisection."""
    low, high = 0.0, math.pi / 2
    # As many halvings as a float has bits.
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _central(middle, degrees) < level else (low, middle)
    return math.tan(low) * math.sqrt(degrees)


def _central(angle: float, degrees: int) -> float:
    """The probability in the angle atan(t / sqrt(degrees)), where it is a finite series."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2 == 1
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(1 if odd else 0, degrees - 1, 2):
        total += term
        term *= cosine * cosine * (k + 1) / (k + 2)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
