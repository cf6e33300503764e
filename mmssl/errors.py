"""Text for people: exceptions for bad input and signals, errors of libraries, and output that data cannot control."""

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that a terminal obeys, that turn the direction of text, or that no encoding has. Tabs and line breaks are
not among them."""


class UserError(Exception):
    """Bad input. The message is one line: what is wrong, where, and how to fix it."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(re.sub(r"\s*\n\s*", " ", message)))


def printable(text: str) -> str:
    """Text with its control characters written out, as \\u001b for ESC. This form is valid in JSON, too."""
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


class StopRequested(KeyboardInterrupt):
    """A signal asked the program to stop. Like Ctrl-C, it passes by what handles errors."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by signal {number}")
        self.number = number


def one_line(error: BaseException, limit: int = 300) -> str:
    """The message of a library's error on one line, cut to `limit` characters."""
    return " ".join(str(error).split())[:limit]


@contextmanager
def panics_as_user_errors(message: str) -> Iterator[None]:
    """Report a panic of a library in Rust, which no `except Exception` catches, as bad input.

    Raises:
        UserError: `message` with the reason.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{message}: {one_line(error)}") from None


def console(*, stderr: bool = False, quiet: bool = False) -> "Console":
    """A console of rich for text from anywhere: control characters are written out, and brackets are no markup."""
    found: Console = _console_class()(stderr=stderr, quiet=quiet, markup=False)
    return found


@cache
def _console_class() -> Any:
    from rich.console import Console
    from rich.segment import Segment
    from rich.text import Text

    class CleanConsole(Console):
        """Everything printed comes through `render`: as text before it is laid out, then in pieces that are text or
        rich's own control codes."""

        def render(self, renderable: Any, *args: Any, **kwargs: Any) -> Iterable[Segment]:
            if isinstance(renderable, Text) and _CONTROL.search(renderable.plain):
                renderable = renderable.copy()
                renderable.plain = printable(renderable.plain)
            for piece in super().render(renderable, *args, **kwargs):
                yield piece if piece.control else Segment(printable(piece.text), piece.style)

    return CleanConsole


class _CleanStream:
    """A text stream that writes control characters out."""

    def __init__(self, stream: TextIO) -> None:
        self.rich_proxied_file = stream
        """The stream for consoles of rich, which clean their own text and then add colours."""

    def write(self, text: str) -> int:
        # Progress bars of libraries begin with a carriage return.
        start = len(text) - len(text.lstrip("\r"))
        self.rich_proxied_file.write(text[:start] + printable(text[start:]))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)


@contextmanager
def clean_streams() -> Iterator[None]:
    """Clean everything that the block prints, also warnings, logs and tracebacks."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_CleanStream(stream) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
