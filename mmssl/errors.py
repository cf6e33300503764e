"""The one exception for bad input."""


class UserError(Exception):
    """Bad input. The message is one line: what is wrong, where, and how to fix it."""
