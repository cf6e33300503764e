"""A remote file being read, and the reasons why one cannot be."""

from collections.abc import Iterator
from dataclasses import dataclass

from mmssl.types import UserError


@dataclass(frozen=True)
class Opened:
    """A file being read."""

    begin: int
    """Where its bytes begin."""
    size: int | None
    """Bytes of the whole file, where the server tells."""
    tag: str | None
    """Changes with the content, where the server tells."""
    pieces: Iterator[bytes]


class BrokenOffError(Exception):
    """A read ended early for a reason that may pass. `pause` is what the server asked for, in seconds."""

    def __init__(self, message: str, pause: float = 0.0) -> None:
        super().__init__(message)
        self.pause = pause


class MissingError(UserError):
    """There is no such file, or it may not be read: object stores say the one where they mean the other."""
