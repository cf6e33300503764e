"""Class names and prompt templates: from files, or ImageNet's from open_clip."""

import json
from collections.abc import Sequence
from pathlib import Path

from mmssl.errors import UserError

Templates = tuple[str, ...] | dict[str, tuple[str, ...]]
"""Templates for all classes, with `{c}` for the name, or class name -> its prompts (like CuPL)."""
DEFAULT_TEMPLATES: Templates = ("a photo of a {c}.",)
"""Default without templates from the data or the user."""


def fill(classnames: Sequence[str], templates: Templates) -> list[list[str]]:
    """The prompts of each class.

    Raises:
        UserError: class-specific prompts lack a class.
    """
    if isinstance(templates, tuple):
        return [[template.replace("{c}", name) for template in templates] for name in classnames]
    missing = [name for name in classnames if name not in templates]
    if missing:
        raise UserError(f"the class-specific prompts lack class {missing[0]!r}; add one or use templates with {{c}}")
    return [list(templates[name]) for name in classnames]


def read_classnames(source: str | Path) -> tuple[str, ...]:
    """Class names from a file, one per line: line 1 is class 0. `imagenet` gives open_clip's 1,000 names.

    Raises:
        UserError: the file is missing or empty, or has an empty line, which would shift the labels.
    """
    if source == "imagenet":
        return imagenet_classnames()
    lines = _read(Path(source), "class names").rstrip().splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise UserError(
                f"line {number} of {source} is empty; every line names a class: remove it or name the class"
            )
    if not lines:
        raise UserError(f"{source} is empty; write one class name per line, in the order of the labels")
    return tuple(line.strip() for line in lines)


def read_templates(source: str | Path) -> Templates:
    """Prompt templates: one per line with `{c}` for the class name, or a .json file of class name -> list of prompts.

    `openai-imagenet` gives OpenAI's 80 templates and `simple-imagenet` its 7 best, from open_clip.

    Raises:
        UserError: the file is missing or empty, a line has no `{c}`, or the JSON has another form.
    """
    if source in ("openai-imagenet", "simple-imagenet"):
        return imagenet_templates(simple=source == "simple-imagenet")
    path = Path(source)
    text = _read(path, "prompt templates")
    if path.suffix == ".json":
        return _class_prompts(path, text)
    templates = tuple(line.strip() for line in text.splitlines() if line.strip())
    for template in templates:
        if "{c}" not in template:
            raise UserError(f"template {template!r} in {path} has no {{c}}; write {{c}} where the class name goes")
    if not templates:
        raise UserError(f"{path} is empty; write one template per line, for example: a photo of a {{c}}.")
    return templates


def imagenet_classnames() -> tuple[str, ...]:
    """The 1,000 names that open_clip uses for ImageNet-1k."""
    from open_clip import IMAGENET_CLASSNAMES

    return tuple(IMAGENET_CLASSNAMES)


def imagenet_templates(simple: bool = False) -> tuple[str, ...]:
    """OpenAI's 80 ImageNet templates, or their subset of 7."""
    from open_clip import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

    return tuple(template("{c}") for template in (SIMPLE_IMAGENET_TEMPLATES if simple else OPENAI_IMAGENET_TEMPLATES))


def _class_prompts(path: Path, text: str) -> dict[str, tuple[str, ...]]:
    try:
        tree = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} must be an object of class name -> list of prompts, found {type(tree).__name__}")
    for name, prompts in tree.items():
        if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) for p in prompts):
            raise UserError(f"class {name!r} in {path} must have a non-empty list of prompts")
    return {name: tuple(prompts) for name, prompts in tree.items()}


def _read(path: Path, what: str) -> str:
    try:
        # Some editors begin a file with a byte-order mark.
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"no {what} at {path}; give the path of a text file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {what} from {path}: {error}") from None
