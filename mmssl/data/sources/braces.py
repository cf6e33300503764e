"""Braces in patterns of shards, such as `{00000..00099}`. How much a pattern names is known before it is expanded."""

import re
from dataclasses import dataclass, field

from braceexpand import alphabet, braceexpand

from mmssl.errors import UserError

_MAX_NAMES = 2_000_000
_MAX_BYTES = 1 << 30
_MAX_DEPTH = 50
_LEVEL_BYTES = 64
"""Memory of a name at each level of braces while it is expanded: a tuple."""
_NUMBERS = re.compile(r"^(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?$")
_LETTERS = re.compile(r"^([A-Za-z])\.\.([A-Za-z])(?:\.\.-?(\d+))?$")
_SHOWN = 300
"""Characters of a pattern in a message, and of a range that is read."""


def expand_braces(pattern: str) -> list[str]:
    """Expand `{a,b}`, `{00..10..2}` and `{a..c}` like a shell. Text with unbalanced braces stays as it is.

    Raises:
        UserError: more than two million names or a GiB of them, or braces inside braces inside braces, 50 times.
    """
    size = _size(pattern)
    if size is None:
        return [pattern]
    shown = pattern if len(pattern) < _SHOWN else f"{pattern[:_SHOWN]}..."
    if size.depth > _MAX_DEPTH:
        raise UserError(f"pattern {shown} has braces inside braces, {size.depth:,} deep; {_MAX_DEPTH} are possible")
    if size.names > _MAX_NAMES:
        raise UserError(f"pattern {shown} names more than {_MAX_NAMES:,} shards; shorten its ranges")
    if size.bytes > _MAX_BYTES:
        raise UserError(f"pattern {shown} takes more than a GiB to expand; shorten its ranges or its names")
    return list(braceexpand(pattern, escape=False))


@dataclass
class _Size:
    """What a pattern, or a part of one, takes when it is expanded."""

    names: int = 1
    bytes: int = 0
    """Characters of all names, and memory of the parts that they are joined from."""
    depth: int = 0

    def times(self, other: "_Size") -> None:
        """Each name is followed by each of another part. Numbers beyond the limits need not be exact."""
        total = self.bytes * other.names + other.bytes * self.names
        self._become(self.names * other.names, total, other.depth)

    def plus(self, other: "_Size") -> None:
        """The names of another part are added."""
        self._become(self.names + other.names, self.bytes + other.bytes, other.depth)

    def _become(self, names: int, total: int, depth: int) -> None:
        self.names, self.bytes = min(names, _MAX_NAMES + 1), min(total, _MAX_BYTES + 1)
        self.depth = max(self.depth, depth)


@dataclass
class _Open:
    """Braces that are open: the alternatives before the last comma, and the one after it."""

    start: int
    before: _Size | None = None
    last: _Size = field(default_factory=_Size)

    def next(self) -> None:
        """Begin another alternative."""
        if self.before is None:
            self.before = self.last
        else:
            self.before.plus(self.last)
        self.last = _Size()

    def close(self, pattern: str, end: int) -> _Size:
        """The size of the whole, closed at a place of the pattern."""
        simple = self.before is None and self.last.depth == 0
        size = _range_size(pattern[self.start : end]) if simple else None
        if size is None and self.before is None:
            size = self.last
            size.bytes += 2 * size.names  # no list: the braces are part of the names
        elif size is None:
            self.next()
            size = self.before
        assert size is not None
        size.bytes += _LEVEL_BYTES * size.names
        size.depth += 1
        return size


def _size(pattern: str) -> _Size | None:
    """What a pattern takes when it is expanded, without expanding it; None if its braces are not balanced.

    One pass without recursion, since braces may be nested in any number.
    """
    opened, surplus, end = [_Open(0)], 0, 0
    for mark in re.finditer(r"[{},]", pattern):
        opened[-1].last.times(_Size(1, mark.start() - end))
        end = mark.end()
        if mark[0] == "{" and surplus == 0:
            opened.append(_Open(end))
        elif mark[0] == "}" and len(opened) > 1:
            closed = opened.pop()
            opened[-1].last.times(closed.close(pattern, mark.start()))
        elif mark[0] == "," and len(opened) > 1:
            opened[-1].next()
        else:
            # Letters outside of braces. A } that closes nothing makes a letter of the next {.
            surplus += {"}": 1, "{": -1, ",": 0}[mark[0]]
            opened[-1].last.times(_Size(1, 1))
    opened[-1].last.times(_Size(1, len(pattern) - end))
    return opened[0].last if len(opened) == 1 and surplus == 0 else None


def _range_size(text: str) -> _Size | None:
    """The size of `1..9`, `01..99..2` or `a..z`; None for other text."""
    numbers = _NUMBERS.match(text)
    letters = None if numbers else _LETTERS.match(text)
    if numbers is not None and len(text) > _SHOWN:  # Python does not read numbers of thousands of digits
        return _Size(_MAX_NAMES + 1)
    if numbers is not None:
        low, high, step = int(numbers[1]), int(numbers[2]), int(numbers[3] or 1)
        width = max(len(numbers[1]), len(numbers[2]))
    elif letters is not None:
        low, high = (alphabet.index(letter) for letter in (letters[1], letters[2]))
        step, width = int(letters[3] or 1), 1
    else:
        return None
    count = min(abs(high - low) // (step or 1) + 1, _MAX_NAMES + 1)
    return _Size(count, count * width)
