"""The reference of configuration keys and of the command line, as Markdown, read off the code.

`python -m scripts.docs_reference` writes it into the pages of docs/reference/.
"""

import inspect
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer.main
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from mmssl.cli import app
from mmssl.config import Config, ObjectiveConfig
from mmssl.objectives import find_objective, objective_names

_BOUNDS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than", "min_length": "not empty: at least"}


def configuration() -> str:
    """Every key: its values, its default and what it does, a table for each section."""
    lines = list(_section(Config, ""))
    lines += [
        "## Options of each objective",
        "",
        "`weight`, `start`, `end`, `ramp` and `every` stand beside these.",
        "",
    ]
    for name in objective_names():
        options = find_objective(name).Options
        weight = options.model_fields["weight"].default
        lines += [f"### objectives.{name}", "", f"{_summary(options)} Default `weight`: {weight:g}.", ""]
        own = {key: field for key, field in options.model_fields.items() if key not in ObjectiveConfig.model_fields}
        if own:
            lines += _table(own, f"objectives.{name}.")
    return "\n".join(lines)


def dotted_keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Every key, with NAME where a name is free and [] for an entry of a list."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        for inner, between in _inner(field.annotation):
            yield from dotted_keys(inner, f"{prefix}{name}{between}.")


def command_line() -> str:
    """Every verb: how it is called, what it does, its arguments and options."""
    return "\n".join(_commands(typer.main.get_command(app), "mmssl"))


def _section(model: type[BaseModel], prefix: str) -> Iterator[str]:
    """A table of a section's own keys, then its sections."""
    yield from [f"## {prefix.rstrip('.') or 'Top level'}", "", _summary(model), ""]
    yield from _table(model.model_fields, prefix)
    for name, field in model.model_fields.items():
        for inner, between in _inner(field.annotation):
            yield from _section(inner, f"{prefix}{name}{between}.")


def _inner(annotation: Any, between: str = "") -> Iterator[tuple[type[BaseModel], str]]:
    """Sections inside a type, and what stands in their keys between the field's name and theirs."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, between
    place = {dict: ".NAME", list: "[]"}.get(get_origin(annotation), "")
    for argument in get_args(annotation):
        yield from _inner(argument, between + place)


def _table(fields: dict[str, FieldInfo], prefix: str) -> list[str]:
    rows = ["| key | values | default | |", "| --- | --- | --- | --- |"]
    for name, field in fields.items():
        cells = (f"`{prefix}{name}`", _values(field), _default(field), " ".join((field.description or "").split()))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return [*rows, ""]


def _values(field: FieldInfo) -> str:
    """What may stand there, in words."""
    words = _type(field.annotation)
    bounds = [
        f"{phrase} {getattr(constraint, name):g}"
        for constraint in field.metadata
        for name, phrase in _BOUNDS.items()
        if getattr(constraint, name, None) is not None
    ]
    return ", ".join([words, *bounds])


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_type(argument) for argument in arguments)
    if origin is list:
        return f"list of {_type(arguments[0])}"
    if origin is dict:
        return f"name to {_type(arguments[1])}"
    if origin is tuple:
        return f"{len(arguments)} numbers"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    names = {str: "text", float: "number", bool: "true or false", type(None): "null", Any: "anything", int: "integer"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)).lower())


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, BaseModel) or value is PydanticUndefined:
        return ""
    if isinstance(value, dict) and any(isinstance(inner, BaseModel) for inner in value.values()):
        return ", ".join(f"`{name}`" for name in value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"`{list(value) if isinstance(value, tuple) else value}`"


def _commands(command: Any, path: str) -> Iterator[str]:
    """A verb, or the verbs of a group. `Any`: typer carries its own copy of click, which has no public name."""
    if hasattr(command, "commands"):
        if path != "mmssl":
            yield from [f"## {path}", "", command.help or "", ""]
        for name in sorted(command.commands):
            yield from _commands(command.commands[name], f"{path} {name}")
        return
    yield from [f"{'##' if path.count(' ') == 1 else '###'} {path}", "", f"```text\n{_usage(command, path)}\n```", ""]
    yield from [_prose(command.help or ""), ""]
    rows = [
        f"| {name} | {(param.help or '').replace('|', chr(92) + '|')}{_shown_default(param)} |"
        for param in command.params
        if (name := _name(param)) != "`--help`"
    ]
    if rows:
        yield from ["| | |", "| --- | --- |", *rows, ""]


def _usage(command: Any, path: str) -> str:
    words = [_argument(param) for param in command.params if param.param_type_name == "argument"]
    required = [
        f"{param.opts[0]} {_metavar(param)}"
        for param in command.params
        if param.param_type_name == "option" and param.required
    ]
    return " ".join([path, *words, *required, "[OPTIONS]"])


def _argument(param: Any) -> str:
    name = param.metavar or param.name.upper() + ("..." if param.nargs == -1 else "")
    return str(name) if param.required or name.startswith("[") else f"[{name}]"


def _name(param: Any) -> str:
    if param.param_type_name == "argument":
        return f"`{_argument(param)}`"
    names = [*param.opts, *param.secondary_opts]
    value = "" if param.is_flag else f" {_metavar(param)}"
    return ", ".join(f"`{name}{value if name.startswith('--') else ''}`" for name in names)


def _metavar(param: Any) -> str:
    return str(param.metavar or param.name.upper())


def _shown_default(param: Any) -> str:
    if param.param_type_name == "argument" or param.required or param.default in (None, False, (), []):
        return ""
    return f" Default: {'yes' if param.default is True else f'`{param.default}`'}."


def _prose(text: str) -> str:
    """Help as Markdown: words in capitals with angle brackets or stars would be markup."""
    return inspect.cleandoc(text).replace("<", "&lt;").replace("*", "\\*")


def _summary(model: type[BaseModel]) -> str:
    return inspect.getdoc(model) or ""


PAGES = {"configuration.md": ("configuration", configuration), "command-line.md": ("command line", command_line)}
"""Page of docs/reference/ -> the name of its generated part, and the function that makes it."""


def filled(page: str, text: str) -> str:
    """The text of a page with its generated part made anew."""
    name, make = PAGES[page]
    begin, end = f"<!-- generated: {name} -->\n", "<!-- generated: end -->"
    pattern = re.compile(f"(?<={re.escape(begin)}).*?(?={end})", re.DOTALL)
    return pattern.sub(lambda _: f"\n{make().strip()}\n\n", text)


def write_pages() -> None:
    """Make the generated part of every page anew."""
    for page in PAGES:
        path = Path(__file__).parents[1] / "docs" / "reference" / page
        path.write_text(filled(page, path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    write_pages()
