"""Fields of samples that an index stores beside the captions, and conditions on them."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
import numpy.typing as npt

from mmssl.errors import UserError
from mmssl.types import Sample

MOST_FIELDS = 64
"""Fields of a shard that are stored unless others are named; the most frequent ones."""
MOST_VALUES = 64
"""Values of a list that are stored."""
LONGEST = 256
"""Characters of a value, and of a name; longer ones are left out."""
TEXTS = ("key", "caption", "shard")
"""Columns that every index has; conditions may name them too."""
_LEFT_OUT = (*TEXTS, "embedding", "txt", "captions")
_CONDITION = re.compile(r"\s*([^=!<>~]*[^=!<>~\s])\s*(!=|<=|>=|=|<|>|~)\s*(.*?)\s*", re.DOTALL)
_NUMBER = re.compile(r"[+-]?\d{1,40}(\.\d{1,40})?([eE][+-]?\d{1,3})?")
_HOLDS = {
    "<": lambda value, bound: value < bound,
    "<=": lambda value, bound: value <= bound,
    ">": lambda value, bound: value > bound,
    ">=": lambda value, bound: value >= bound,
}


@dataclass(frozen=True)
class Condition:
    """FIELD, an operator and a value: `style=noto`, `year>=1900`, `caption~apple`, `author!=unknown`.

    A field may have several values, as of a list of tags: one of them must meet the condition; `!=` wants that none is
    equal. Numbers are compared as numbers, other values as text; `~` finds a part of a text, in any case.
    """

    field: str
    operator: str
    value: str

    @classmethod
    def parse(cls, text: str) -> "Condition":
        """Raises UserError if it is none."""
        found = _CONDITION.fullmatch(text)
        if found is None:
            raise UserError(
                f"--where {text!r} is not a condition; write FIELD=VALUE, or one of != < <= > >= ~ (contains) in "
                f"place of =, for example 'year>=1900'"
            )
        return cls(*found.groups())

    def accepts(self, value: str) -> bool:
        """True if a value meets it; for `!=`, if the value is the one that must not be there."""
        if self.operator == "~":
            return self.value.casefold() in value.casefold()
        numbers = _number(value), _number(self.value)
        both = None not in numbers
        if self.operator in ("=", "!="):
            return value == self.value or (both and numbers[0] == numbers[1])
        if numbers[1] is not None:
            return both and bool(_HOLDS[self.operator](*numbers))
        return bool(_HOLDS[self.operator](value, self.value))

    def rows(self, column: Any) -> npt.NDArray[np.bool_]:
        """The rows that meet it, bool [n], of a column of texts or of lists of texts (pyarrow)."""
        array = column.combine_chunks()
        lists = hasattr(array, "value_parent_indices")
        values = (array.flatten() if lists else array).dictionary_encode()
        parents = array.value_parent_indices().to_numpy() if lists else np.arange(len(array))
        # Each different value is looked at once.
        accepted = np.array([self.accepts(value) for value in values.dictionary.to_pylist()], dtype=bool)
        found = np.zeros(len(array), dtype=bool)
        found[parents[accepted[values.indices.to_numpy(zero_copy_only=False)]]] = True
        return ~found if self.operator == "!=" else found


def _number(text: str) -> Decimal | None:
    """Exact, so that long ids stay different."""
    return Decimal(text) if _NUMBER.fullmatch(text) else None


def field_columns(samples: Sequence[Sample], wanted: Sequence[str] | None) -> dict[str, list[list[str]]]:
    """The values of each field of the samples, as texts: short texts, numbers and truth values, and lists of these.

    Args:
        wanted: their names; None: all, at most MOST_FIELDS.
    """
    found = [
        {
            name: values
            for name, value in sample.fields.items()
            if name not in _LEFT_OUT
            and (len(name) <= LONGEST if wanted is None else name in wanted)
            and (values := _texts(value))
        }
        for sample in samples
    ]
    counts = Counter(name for fields in found for name in fields)
    return {_clean(name): [fields.get(name, []) for fields in found] for name, _ in counts.most_common(MOST_FIELDS)}


def _texts(value: Any) -> list[str]:
    items = value[:MOST_VALUES] if isinstance(value, list) else [value]
    return [text for text in map(_text, items) if text]


def _text(item: Any) -> str:
    """A value as text; empty if it is none that is stored."""
    if isinstance(item, bool):
        return str(item).lower()
    if isinstance(item, int) or (isinstance(item, float) and math.isfinite(item)):
        item = str(item)
    return _clean(item.strip()) if isinstance(item, str) and len(item) <= LONGEST else ""


def _clean(text: str) -> str:
    """JSON can spell halves of characters, which no file can hold."""
    return text.encode("utf-8", "replace").decode()
