"""Reading a `Config` from YAML and `key=value` overrides, and writing it back."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from mmssl.config.config import Config
from mmssl.errors import UserError

_PRESETS = Path(__file__).with_name("presets")
_RENAMED = {"picture_steps": "image_steps", "changed": "augment"}
"""Keys of version 0.1.0 in any section -> current names."""
_REMOVED = {"mixer": {"balance": "fixed"}, "optim": {"name": "adamw"}}
"""Removed settings of version 0.1.0, by section. Each had only one useful value."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file or a preset, apply `key=value` overrides (values are YAML), and check it all.

    Raises:
        UserError: the file is missing or not a YAML mapping, or a key or value is wrong; the message names the key.
    """
    tree = read_tree(path)
    for override in overrides:
        set_key(tree, *parse_override(override))
    return parse_config(tree, where=str(path))


def preset_names() -> list[str]:
    """Names of the configurations that are part of the package."""
    return sorted(path.stem for path in _PRESETS.glob("*.yaml"))


def preset_text(name: str) -> str:
    """The YAML text of a preset; its first comment says what it is for."""
    return (_PRESETS / f"{name}.yaml").read_text(encoding="utf-8")


def _find(name: str | Path) -> Path:
    """A YAML file by its path, or a preset by its name.

    Raises:
        UserError: neither exists.
    """
    path = Path(name)
    if path.is_file():
        return path
    if str(name) in preset_names():
        return _PRESETS / f"{name}.yaml"
    near = difflib.get_close_matches(str(name), preset_names(), n=1)
    hint = f"did you mean the preset {near[0]!r}?" if near else "give the path of a YAML file, or a preset"
    raise UserError(f"no configuration file at {path}; {hint} (mmssl presets lists them)")


def read_tree(path: str | Path) -> dict[str, Any]:
    """A YAML file, or a preset, as a nested mapping, unchecked.

    Raises:
        UserError: the file is missing or not a YAML mapping.
    """
    path = _find(path)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold a mapping of keys to values, found {type(tree).__name__}")
    _upgrade(tree)
    return tree


def parse_config(tree: Mapping[str, Any], where: str) -> Config:
    """Check a nested mapping; `where` names its source in messages."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{where}: {_explain(error)}") from None


def dump_config(config: Config) -> str:
    """The whole configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def known_keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the configuration, sections included."""
    for name, field in model.model_fields.items():
        yield prefix + name
        section = _section(field.annotation)
        if section is not None:
            yield from known_keys(section, f"{prefix}{name}.")


def parse_override(override: str) -> tuple[str, Any]:
    """Dotted key and value of `key=value`, the value read as YAML.

    Raises:
        UserError: it does not have this form.
    """
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r} does not have the form key=value, for example optim.lr=1e-3")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(
            f"override {override!r} has a value that is not valid YAML: {' '.join(str(error).split())}"
        ) from None


def set_key(tree: dict[str, Any], key: str, value: Any) -> None:
    """Put a value under a dotted key into a nested mapping; missing sections are created.

    A key of the mapping may itself contain dots (`objectives: {my_lab.brightness: ...}`); the longest
    existing one is used.

    Raises:
        UserError: a parent of the key is a value, not a section.
    """
    node = tree
    *parents, last = _split_key(tree, key)
    for depth, name in enumerate(parents):
        child = node.setdefault(name, {})
        if child is None:
            child = node[name] = {}
        if not isinstance(child, dict):
            raise UserError(f"{key}={value!r}: {'.'.join(parents[: depth + 1])} is a value, not a section")
        node = child
    node[last] = value


def _split_key(tree: dict[str, Any], key: str) -> list[str]:
    """The keys of nested mappings that a dotted key goes through."""
    parts, names = key.split("."), list[str]()
    node: Any = tree
    while parts:
        ends = (n for n in range(len(parts), 0, -1) if isinstance(node, dict) and ".".join(parts[:n]) in node)
        end = next(ends, 1)
        names.append(".".join(parts[:end]))
        node = node.get(names[-1]) if isinstance(node, dict) else None
        parts = parts[end:]
    return names


def _upgrade(tree: dict[str, Any]) -> None:
    """Convert a tree that version 0.1.0 wrote to the current keys."""
    for section, removed in _REMOVED.items():
        for key, value in removed.items():
            if isinstance(tree.get(section), dict) and tree[section].get(key) == value:
                del tree[section][key]
    model = tree.get("model")
    text = model.get("text") if isinstance(model, dict) else None
    if isinstance(model, dict) and isinstance(text, dict) and text.get("name") == model.get("start") is not None:
        del text["name"]  # it meant the towers of `start`, not written out yet
    data = tree.get("data")
    if isinstance(data, dict):
        for key in ("dir", "gib"):
            if f"cache_{key}" in data:
                data.setdefault("cache", {})[key] = data.pop(f"cache_{key}")
    _rename(tree)


def _rename(tree: dict[str, Any]) -> None:
    for key in list(tree):
        value = tree.pop(key)  # put back in the same place under its current name
        if isinstance(value, dict):
            _rename(value)
        tree[_RENAMED.get(key, key)] = value


def _section(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _explain(error: ValidationError) -> str:
    """The first problem, as one line with the dotted key and, for an unknown key, the nearest known one."""
    problem = error.errors()[0]
    location = [str(part) for part in problem["loc"]]
    more = f" ({error.error_count() - 1} more problems)" if error.error_count() > 1 else ""
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        keys = list(known_keys())
        near = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
        near = near or [k for k in keys if k.rsplit(".", 1)[-1] == location[-1]][:1]
        hint = f"; did you mean '{near[0]}'?" if near else ""
        return f"unknown key '{key}'{hint}{more}"
    if problem["type"] == "missing":
        return f"missing key '{key}'; add it to the file or pass {key}=VALUE{more}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{message}{more}"
    return f"'{key}' = {problem['input']!r}: {message[0].lower()}{message[1:]}{more}"
