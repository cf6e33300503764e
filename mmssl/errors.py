"""The exceptions for bad input and for a signal to stop, and the text of other libraries' errors."""


class UserError(Exception):
    """Bad input. The message is one line: what is wrong, where, and how to fix it."""


class StopRequested(KeyboardInterrupt):
    """A signal asked the program to stop. Like Ctrl-C, it passes by what handles errors."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by signal {number}")
        self.number = number


def one_line(error: BaseException, limit: int = 300) -> str:
    """The message of a library's error on one line, cut to `limit` characters."""
    return " ".join(str(error).split())[:limit]
