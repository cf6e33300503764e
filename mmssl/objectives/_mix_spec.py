"""Mixes of objectives as a user writes them: `contrastive+mlm(weight=0.05,every=2)`."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mmssl.config import ObjectiveConfig
from mmssl.errors import UserError
from mmssl.objectives import objective_names

ALL = "all"
"""The mix of every configured objective that has a weight."""


@dataclass(frozen=True)
class Mix:
    """Some of the configured objectives, perhaps with other weights or schedules."""

    name: str
    """As the user wrote it, without blanks."""
    objectives: dict[str, dict[str, Any]]
    """Objective -> its entry of the configuration; what is not written there has the objective's default."""


def parse_mix(text: str, configured: Mapping[str, ObjectiveConfig]) -> Mix:
    """One mix: objectives joined by `+`, each perhaps with `(option=value,...)`, or `all`.

    An objective has the options of its entry in the configuration, where there is one, and those in brackets.

    Raises:
        UserError: it is not of that form, or names an objective that does not exist or has no weight.
    """
    name = "".join(text.split())
    objectives: dict[str, dict[str, Any]] = {}
    weighted = [objective for objective, entry in configured.items() if entry.weight > 0]
    for part in weighted if name == ALL else _split(name, "+"):
        found = re.fullmatch(r"(\w+)(?:\((.*)\))?", part)
        if found is None:
            raise UserError(f"--mix {text!r}: {part!r} is not of the form mlm or mlm(weight=0.05,every=2)")
        objective, changes = found[1], found[2]
        if objective not in objective_names():
            raise UserError(
                f"--mix {text!r}: unknown objective {objective!r}; there are {', '.join(objective_names())}"
            )
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
    """Parts of a text between separators that stand in no bracket."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts
