"""Settings as a table: setting, value, why."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Column, Table
from rich.text import Text

from mmssl.apps.autoconfig.choose import Choice


def settings_table(choices: Sequence[Choice], pinned: Mapping[str, Any]) -> Table:
    """What was chosen, and below what was given."""
    table = Table(Column("setting", no_wrap=True), Column("value", overflow="fold"), "why", box=SIMPLE_HEAD)
    for choice in choices:
        table.add_row(choice.key, Text(short(choice.value)), choice.why)
    for key, value in pinned.items():
        table.add_row(key, Text(short(value)), "given")
    return table


def short(value: Any) -> str:
    """A value in few characters, as it is written in YAML."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {short(inner)}" for name, inner in value.items())
    if isinstance(value, list | tuple):
        return f"[{', '.join(short(inner) for inner in value)}]"
    return str(value)
