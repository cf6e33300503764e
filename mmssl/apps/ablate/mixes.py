"""The mixes that an ablation compares, as a user names them: on the command line, or in a plan file."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmssl.config import ObjectiveConfig, read_tree
from mmssl.errors import UserError
from mmssl.objectives import mix_spec, mixing

_KEYS = {"mix", "settings"}
_EXAMPLE = "tags: {mix: contrastive+words, settings: {data.captions: ['{name}', '{tags}']}}"


@dataclass(frozen=True)
class MixRequest:
    """A mix of objectives with a name, and the settings in which its runs differ from the configuration."""

    name: str
    objectives: str
    """As for `--mix`: `contrastive+mlm(weight=0.05)`."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Dotted key -> value."""


def request_mixes(texts: Sequence[str], configured: Mapping[str, ObjectiveConfig]) -> list[MixRequest]:
    """Mixes written as `contrastive+mlm`, the baseline first. Without texts: the default mixes."""
    return [MixRequest("".join(text.split()), text) for text in texts or default_mixes(configured)]


def read_plan_file(path: Path) -> list[MixRequest]:
    """The mixes of a YAML file, the baseline first: name -> objectives, or name -> {mix: objectives, settings: {...}}.

    Raises:
        UserError: the file is missing or has another form; the message names the entry.
    """
    found = []
    for name, entry in read_tree(path).items():
        entry = {"mix": entry} if isinstance(entry, str) else entry
        settings = entry.get("settings", {}) if isinstance(entry, dict) else None
        if not isinstance(settings, dict) or not isinstance(entry.get("mix"), str) or set(entry) - _KEYS:
            raise UserError(f"{path}: {name!r} is not of the form {_EXAMPLE}")
        found.append(MixRequest(str(name), entry["mix"], settings))
    return found


def default_mixes(configured: Mapping[str, ObjectiveConfig]) -> list[str]:
    """The baseline alone, with each other objective, and all. Baseline: contrastive, else siglip, else the first."""
    names = [name for name, entry in configured.items() if entry.weight > 0]
    base = mixing.find_reference(names) or names[0]
    others = [name for name in names if name != base]
    return [base, *(f"{base}+{name}" for name in others), *([mix_spec.ALL] if len(others) > 1 else [])]


def check_names(mixes: Sequence[MixRequest]) -> None:
    """Refuse mixes that cannot be compared.

    Raises:
        UserError: there are fewer than two, or two have the same folder.
    """
    if len(mixes) < 2:
        raise UserError(
            f"an ablation compares at least two mixes, but there is only {mixes[0].name if mixes else 'none'}; add "
            f"objectives to the configuration, for example objectives.mlm.weight=0.05, or name them with --mix"
        )
    by_folder: dict[str, MixRequest] = {}
    for mix in mixes:
        other = by_folder.setdefault(slug(mix.name), mix)
        if other is not mix:
            raise UserError(f"the mixes {other.name!r} and {mix.name!r} have the same name; leave one of them out")


def slug(name: str) -> str:
    """A folder name for a mix."""
    return re.sub(r"[^A-Za-z0-9.+=-]+", "_", name).strip("_")
