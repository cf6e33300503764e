"""The one exception for bad input, and the text of other libraries' errors."""


class UserError(Exception):
    """Bad input. The message is one line: what is wrong, where, and how to fix it."""


def one_line(error: BaseException, limit: int = 300) -> str:
    """The message of a library's error on one line, cut to `limit` characters."""
    return " ".join(str(error).split())[:limit]
