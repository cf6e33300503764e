"""What a check says."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warning", "error"]
_ORDER: tuple[State, ...] = ("ok", "warning", "error")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    state: State
    found: str
    """What is there."""
    remedy: str = ""
    """What to do; empty where nothing needs to be done."""


def worst(findings: Iterable[Finding]) -> State:
    """The gravest state among findings."""
    return max((finding.state for finding in findings), key=_ORDER.index, default="ok")
