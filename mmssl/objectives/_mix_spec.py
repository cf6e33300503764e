"""Mixes of objectives as a user writes them: `contrastive+mlm(weight=0.05,every=2)`."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mmssl.config import ObjectiveConfig
from mmssl.errors import UserError
from mmssl.objectives._registry import find_objective

ALL = "all"
"""The mix of every configured objective that has a weight."""


@dataclass(frozen=True)
class Mix:
    """A choice of objectives with their options."""

    name: str
    """The user's text without blanks."""
    objectives: dict[str, dict[str, Any]]
    """Objective -> its entry in the configuration; missing options have the objective's defaults."""


def parse_mix(text: str, configured: Mapping[str, ObjectiveConfig]) -> Mix:
    """Parse one mix: objectives joined by `+`, each optionally with `(option=value,...)`, or `all`.

    The options in brackets override those of the objective's entry in the configuration.

    Raises:
        UserError: the text has another form, or an objective does not exist or has no weight.
    """
    name = "".join(text.split())
    objectives: dict[str, dict[str, Any]] = {}
    weighted = [objective for objective, entry in configured.items() if entry.weight > 0]
    for part in weighted if name == ALL else _split(name, "+"):
        found = re.fullmatch(r"([\w.:]+)(?:\((.*)\))?", part)
        if found is None:
            raise UserError(f"--mix {text!r}: {part!r} is not of the form mlm or mlm(weight=0.05,every=2)")
        objective, changes = found[1], found[2]
        try:
            find_objective(objective)
        except UserError as error:
            raise UserError(f"--mix {text!r}: {error}") from None
        if objective in objectives:
            raise UserError(f"--mix {text!r} names {objective} twice; name it once")
        entry = configured.get(objective, ObjectiveConfig()).model_dump(exclude_unset=True)
        objectives[objective] = entry | dict(_options(text, changes))
        if objectives[objective].get("weight") == 0:
            raise UserError(f"--mix {text!r}: {objective} has weight 0; write {objective}(weight=0.1), or leave it out")
    return Mix(name, objectives)


def _options(text: str, changes: str | None) -> Iterator[tuple[str, Any]]:
    for change in _split(changes, ",") if changes else ():
        key, equals, value = change.partition("=")
        if not key or not equals or not value:
            raise UserError(f"--mix {text!r}: {change!r} is not of the form option=value, for example weight=0.05")
        try:
            yield key, json.loads(value)
        except ValueError:
            yield key, value


def _split(text: str, separator: str) -> list[str]:
    """Parts of a text between separators outside brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts
