"""How much room text takes: letters of some scripts are two columns wide."""

import textwrap
from unicodedata import combining, east_asian_width


def columns(text: str) -> int:
    """The width of a text in letters of Latin: wide letters take two, marks upon letters none."""
    return sum(0 if combining(letter) else 2 if east_asian_width(letter) in "WF" else 1 for letter in text)


def wrapped(text: str, width: int, lines: int) -> str:
    """A text in at most so many lines of at most so many columns, its rest left out, if need be within a word."""
    letters = width if columns(text) <= len(text) else width // 2
    found = textwrap.wrap(text[: 4 * letters * lines], letters) or [""]
    if len(found) > lines:
        last = found[lines - 1]
        found[lines - 1] = f"{last} …" if len(last) + 2 <= letters else f"{last[: letters - 1]}…"
    return "\n".join(found[:lines])
