"""Caption templates and caption cleaning."""

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

import ftfy
import numpy as np

from mmssl.errors import UserError

_SLOT = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_NAME = re.compile(r"[^.\[\]!:]+")


def render_caption(fields: Mapping[str, Any], templates: Sequence[str], rng: np.random.Generator | None) -> str:
    """Render a sample's caption from one of the templates, such as `{txt}` or `{label}: {tags}`.

    A field is named in braces; `{{` and `}}` are literal braces. Only whole field names are looked up: attributes,
    indices and formats are refused, so data cannot reach anything else.

    Args:
        fields: the sample's fields. A list renders its items joined by ", ".
        rng: draws the template, and for each list field a non-empty subset in random order. None: the first
            template and full lists.

    Raises:
        UserError: the template is malformed, or names a field that the sample lacks.
    """
    template = templates[0 if rng is None else int(rng.integers(len(templates)))]
    return _SLOT.sub(lambda slot: _fill(slot, template, fields, rng), template)


def check_templates(templates: Sequence[str]) -> None:
    """Raise UserError for a malformed template: a single brace, or anything but a plain name in braces."""
    for template in templates:
        for slot in _SLOT.finditer(template):
            _name(slot, template)


def clean_caption(text: str) -> str:
    """Clean a caption as OpenCLIP does: repair mojibake, resolve HTML entities, collapse white space.

    The repair (ftfy) is skipped for plain ASCII, which it would not change.
    """
    if not text.isascii():
        text = ftfy.fix_text(text)
    if "&" in text:
        text = html.unescape(html.unescape(text))
    return " ".join(text.split())


def _fill(slot: re.Match[str], template: str, fields: Mapping[str, Any], rng: np.random.Generator | None) -> str:
    name = _name(slot, template)
    if name is None:
        return slot.group()[0]
    if name not in fields:
        known = ", ".join(sorted(fields)) or "none"
        raise UserError(f"caption template {template!r} names the field {name!r}; the sample has: {known}")
    value = fields[name]
    if not isinstance(value, (list, tuple)):
        return str(value)
    if rng is not None and len(value) > 1:
        value = [value[i] for i in rng.permutation(len(value))[: rng.integers(1, len(value) + 1)]]
    return ", ".join(str(item) for item in value)


def _name(slot: re.Match[str], template: str) -> str | None:
    """Field name of a slot; None for a doubled brace."""
    if slot.group() in ("{{", "}}"):
        return None
    name: str | None = slot.group(1)
    if name is None or _NAME.fullmatch(name) is None:
        raise UserError(
            f"caption template {template!r} is malformed at {slot.group()!r}; "
            "a field is a plain name in braces, for example {txt}, and a plain brace is doubled"
        )
    return name
