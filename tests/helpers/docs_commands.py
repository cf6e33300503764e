"""Commands in shell code: found, checked against the command line, and run in this process."""

import re
import shlex
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import typer.main

from mmssl.build import objective_options
from mmssl.cli import app, main
from mmssl.config import load_config
from scripts.bench.__main__ import app as bench_app
from tests.helpers.docs_blocks import ROOT

NAMES = ("mmssl", ".venv/bin/mmssl")
MODULES = {"mmssl": (), "mmssl.train": ("train",)}
"""Verbs of `mmssl` that `-m NAME` starts."""
BENCH = "scripts.bench"
_SHELL = re.compile(r"[$`;&|<>()]")
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")
_OPERATOR = re.compile(r"\d*[<>|&;].*")
_NOT_OF_ONE_WORD = re.compile(r"'[^']*'|\"[^\"]*\"|#.*")


def lines(code: str) -> list[str]:
    """Lines of shell code, continued ones joined, without empty ones and comments."""
    joined = code.replace("\\\n", " ")
    found, part = [], ""
    for line in joined.splitlines():
        part = f"{part}\n{line}" if part else line
        try:
            words = shlex.split(part, comments=True)
        except ValueError:
            # A quote that is still open.
            continue
        if words:
            found.append(part.strip())
        part = ""
    return found


def arguments(line: str) -> list[str] | None:
    """The words behind `mmssl` in a line of shell code, launched in whatever way, up to a pipe, a redirection or `&`;
    None if it does not call it."""
    # An operator within quotes is a word.
    bare = shlex.split(_QUOTED.sub("quoted", line), comments=True)
    count = sum(1 for _ in takewhile(lambda word: _OPERATOR.fullmatch(word) is None, bare))
    words = shlex.split(line, comments=True)[:count]
    for i, word in enumerate(words):
        if word == "-m" and i + 1 < len(words) and words[i + 1] in MODULES:
            return [*MODULES[words[i + 1]], *words[i + 2 :]]
        if word in NAMES:
            return words[i + 1 :]
    return None


def bench_arguments(line: str) -> list[str] | None:
    """The words behind `-m scripts.bench` in a line of shell code; None if it does not call it."""
    words = shlex.split(line, comments=True)
    return words[words.index(BENCH) + 1 :] if BENCH in words else None


def is_plain(line: str) -> bool:
    """Whether a line does nothing but call `mmssl` or a benchmark, so that it needs no shell."""
    words = shlex.split(line, comments=True)
    called = words[0] in NAMES or words[1:3] in (["-m", "mmssl"], ["-m", BENCH])
    return called and _SHELL.search(_NOT_OF_ONE_WORD.sub("", line)) is None


def run(line: str) -> None:
    """Run such a line.

    Raises:
        AssertionError: it does not end with exit code 0.
    """
    bench = bench_arguments(line)
    with pytest.raises(SystemExit) as end:
        main(arguments(line)) if bench is None else bench_app(bench)
    assert not end.value.code, f"{line} ended with {end.value.code}"


def check(words: list[str], program: typer.Typer = app) -> None:
    """Parse the words behind `mmssl` or another program, and their KEY=VALUE against the configuration.

    Raises:
        UsageError of typer's click: an unknown verb or option, or an argument is missing.
        UserError: a key or value that no configuration has.
    """
    command: Any = typer.main.get_command(program)
    words = list(words)
    while hasattr(command, "commands"):
        assert words, "no verb is given"
        assert words[0] in command.commands, f"there is no verb {words[0]!r}"
        command = command.commands[words.pop(0)]
    context = command.make_context(command.name, words)
    overrides = list(context.params.get("overrides") or [])
    config = context.params.get("config")
    if config is not None and "=" in config:
        # With --resume the first word is a change already.
        overrides, config = [config, *overrides], None
    check_overrides(config, overrides)


def check_overrides(config: str | None, overrides: list[str]) -> None:
    """Check KEY=VALUE words on top of a configuration of the repository or of the current folder; of configs/small.yaml
    where none is named.

    Raises:
        UserError: a key or value is wrong, also among the options of an objective.
    """
    places = [] if config is None else [ROOT / config, Path(config)]
    path = next((place for place in places if place.is_file()), ROOT / "configs" / "small.yaml")
    if overrides:
        # Ellipses stand for what readers put there.
        objective_options(load_config(path, [word for word in overrides if word not in ("...", "KEY=VALUE")]))


def options_of(words: list[str], program: typer.Typer = app) -> set[str]:
    """Names of the options that a verb knows, of which the first words are given.

    Raises:
        AssertionError: there is no such verb.
    """
    command: Any = typer.main.get_command(program)
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        if re.fullmatch(r"[a-z_-]+", words[0]) is None:
            break
        assert words[0] in command.commands, f"there is no verb {words[0]!r}"
        command, words = command.commands[words[0]], words[1:]
    return {name for param in command.params for name in (*param.opts, *param.secondary_opts)} | {"--help"}


def inline_code(page: Path) -> Iterator[str]:
    """Code within the text of a page, outside of its blocks."""
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for match in re.finditer(r"`([^`]+)`", text):
        yield " ".join(match[1].split())
