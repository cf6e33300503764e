"""Mixes of objectives as a user writes them: `contrastive+mlm(weight=0.05,every=2)`."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmssl.config import ObjectiveConfig
from mmssl.objectives import reference
from mmssl.types import UserError

ALL = "all"
"""The mix of every configured objective."""


@dataclass(frozen=True)
class Mix:
    """Some of the configured objectives, perhaps with other weights or schedules."""

    name: str
    """As the user wrote it, without blanks."""
    objectives: dict[str, dict[str, Any]]
    """Objective -> its entry of the configuration; what is not written there has the objective's default."""


def parse_mixes(texts: Sequence[str], configured: Mapping[str, ObjectiveConfig]) -> list[Mix]:
    """The mixes to compare, the baseline first; without any, the default ones.

    Raises:
        UserError: a mix names what is not configured, is written twice or wrongly, or there are fewer than two.
    """
    mixes = [parse_mix(text, configured) for text in texts or default_mixes(configured)]
    if len(mixes) < 2:
        raise UserError(
            f"an ablation compares at least two mixes, found {', '.join(m.name for m in mixes)}; add objectives to the "
            f"configuration, for example objectives.mlm.weight=0.05, or name them with --mix"
        )
    seen: dict[str, Mix] = {}
    for mix in mixes:
        other = seen.setdefault(slug(mix.name), mix)
        if other is not mix:
            raise UserError(f"the mixes {other.name!r} and {mix.name!r} have the same name; leave one of them out")
    return mixes


def default_mixes(configured: Mapping[str, ObjectiveConfig]) -> list[str]:
    """Contrastive (or siglip) alone, or the first objective where there is neither; with each other one; and all."""
    names = [name for name, entry in configured.items() if entry.weight > 0]
    base = reference(names) or names[0]
    others = [name for name in names if name != base]
    return [base, *(f"{base}+{name}" for name in others), *([ALL] if len(others) > 1 else [])]


def parse_mix(text: str, configured: Mapping[str, ObjectiveConfig]) -> Mix:
    """One mix: objectives joined by `+`, each perhaps with `(option=value,...)`, or `all`.

    Raises:
        UserError: it is not of that form, or names an objective that is not configured or has no weight.
    """
    name = "".join(text.split())
    objectives: dict[str, dict[str, Any]] = {}
    for part in "+".join(configured).split("+") if name == ALL else _split(name, "+"):
        found = re.fullmatch(r"(\w+)(?:\((.*)\))?", part)
        if found is None:
            raise UserError(f"--mix {text!r}: {part!r} is not of the form mlm or mlm(weight=0.05,every=2)")
        objective, changes = found[1], found[2]
        if objective not in configured:
            raise UserError(
                f"--mix {text!r}: the configuration has no objective {objective!r}, it has {', '.join(configured)}; "
                f"add it, for example with objectives.{objective}.weight=0.1"
            )
        if objective in objectives:
            raise UserError(f"--mix {text!r} names {objective} twice; name it once")
        objectives[objective] = configured[objective].model_dump(exclude_unset=True) | dict(_options(text, changes))
        if objectives[objective].get("weight") == 0:
            raise UserError(f"--mix {text!r}: {objective} has weight 0; write {objective}(weight=0.1), or leave it out")
    return Mix(name, objectives)


def slug(name: str) -> str:
    """The name of a mix as a name of a folder."""
    return re.sub(r"[^A-Za-z0-9.+=-]+", "_", name).strip("_")


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
