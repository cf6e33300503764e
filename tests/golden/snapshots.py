"""Snapshots of what a user types: every verb's help, and every configuration key.

`python -m tests.golden.snapshots` writes them anew after an intended change, which also goes into CHANGELOG.md.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from mmssl.cli import app
from mmssl.config import Config, known_keys

HELP = Path(__file__).parent / "help.txt"
KEYS = Path(__file__).parent / "config_keys.txt"


def help_text() -> str:
    """The help of every verb, one after another, at 100 columns."""
    return "\n".join(_helps(typer.main.get_command(app), None, "mmssl"))


def _helps(command: Any, parent: Any, name: str) -> Iterator[str]:
    context = command.make_context(name, [], parent=parent, resilient_parsing=True, max_content_width=100)
    context.terminal_width = 100
    yield f"$ {context.command_path} --help\n{command.get_help(context)}\n"
    for verb, child in sorted(getattr(command, "commands", {}).items()):
        yield from _helps(child, context, verb)


def config_keys() -> str:
    """Every key that the configuration knows, one per line."""
    return "\n".join(sorted(known_keys(Config))) + "\n"


if __name__ == "__main__":
    HELP.write_text(help_text(), encoding="utf-8")
    KEYS.write_text(config_keys(), encoding="utf-8")
