"""Caption templates and caption cleaning."""

import html
import math
import re
from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from typing import Any

import ftfy
import numpy as np

from mmssl.errors import UserError
from mmssl.types import CAPTION_FIELDS

_SLOT = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_NAME = re.compile(r"[^.\[\]!:|]+(\|(one|all))?")
CAPTION_GROUP = "caption"
"""The name of a group that stands for the caption as it was rendered, not for the field."""
IMAGE_ORDER = "image order"
"""The name of a group that stands for the order in which the images of a sample are shown, not for a field."""
NULLS = "the caption holds null characters"
"""Reason to refuse a text: it is probably UTF-16 that was read as UTF-8."""
LONGEST = 20_000
"""Characters of a caption beyond which it is probably none; training sets the limit by data.max_caption_chars."""
_CAPTION_WORDS = 3
"""Words from which on the items of a list are captions under any name; shorter ones are tags."""


def render_caption(
    fields: Mapping[str, Any],
    templates: Sequence[str],
    rng: np.random.Generator | None,
    weights: Sequence[float] | None = None,
) -> str:
    """Render a sample's caption from one of the templates, such as `{txt}` or `{label}: {tags}`.

    A template that renders nothing, because the fields it names are empty here, gives way to one of the others. So the
    caption is empty only if all of them are.

    A field is named in braces; `{{` and `}}` are literal braces. Only whole field names are looked up: attributes,
    indices and formats are refused, so data cannot reach anything else.

    Several captions of an image are never joined: one of them is drawn. Several captions are a list under a usual name
    (`CAPTION_FIELDS`), a list of texts of three words or more, and the lines of `{txt}`. Other lists are tags. Their
    items are joined by ", ". `{name|one}` and `{name|all}` decide for themselves.

    Args:
        fields: the sample's fields.
        rng: draws the template, one of several captions, and of tags a non-empty subset in random order. None: the
            first template, the first caption and all tags.
        weights: how often each template is drawn. None: equally often.

    Raises:
        UserError: the template is malformed, or names a field that the sample lacks or that is no text.
    """
    place = _draw(len(templates), rng, weights)
    template, others = templates[place], [*templates[:place], *templates[place + 1 :]]
    text = _SLOT.sub(lambda slot: _fill(slot, template, fields, rng), template)
    if text.strip() or not others:
        return text
    return render_caption(fields, others, rng, weights and [*weights[:place], *weights[place + 1 :]])


def sample_captions(fields: Mapping[str, Any]) -> list[str]:
    """All captions of `{txt}`: the list that begins with it under a usual name, or its lines; at least one.

    Raises:
        UserError: the text is missing or is no text.
    """
    text = _text(fields.get("txt"), "txt")
    lists = (fields[name] for name in CAPTION_FIELDS if isinstance(fields.get(name), (list, tuple)))
    listed = next((items for items in lists if items and items[0] == text), None)
    if listed is not None:
        return _texts(listed, "captions")
    return [line.strip() for line in text.splitlines() if line.strip()] or [text]


def every_caption(fields: Mapping[str, Any], template: str) -> list[str]:
    """Each caption that a template renders: one for each of several captions of an image. Tags are in full.

    Raises:
        UserError: as `render_caption`.
    """
    several: dict[str, list[str]] = {}
    for slot in _SLOT.finditer(template):
        name, choice = _name(slot, template)
        items = _choices(fields, name, choice) if name is not None and name in fields else []
        if name is not None and len(items) > 1:
            several[name] = items
    count = max(map(len, several.values()), default=1)
    chosen = ({name: items[i % len(items)] for name, items in several.items()} for i in range(count))
    return [render_caption({**fields, **one}, [template], None) for one in chosen]


def further_captions(
    fields: Mapping[str, Any], templates: Sequence[str], first: str, count: int, rng: np.random.Generator
) -> list[str]:
    """Further captions of a sample beside its first, all different while there are enough; then they begin again.

    Raises:
        UserError: as `render_caption`.
    """
    others = dict.fromkeys(text for template in templates for text in every_caption(fields, template))
    others.pop(first, None)
    others.pop("", None)
    order = [list(others)[place] for place in rng.permutation(len(others))]
    return list(islice(cycle([*order, first]), count))


def length_problem(text: str, limit: int = LONGEST) -> str | None:
    """The reason to refuse a caption for its length, or None."""
    return f"the caption has {len(text)} characters, more than {limit}" if len(text) > limit else None


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


def _draw(count: int, rng: np.random.Generator | None, weights: Sequence[float] | None) -> int:
    """A place among `count`, drawn with weights or equally; the first without a generator."""
    if rng is None:
        return 0
    return int(rng.choice(count, p=np.divide(weights, np.sum(weights))) if weights else rng.integers(count))


def _fill(slot: re.Match[str], template: str, fields: Mapping[str, Any], rng: np.random.Generator | None) -> str:
    name, choice = _name(slot, template)
    if name is None:
        return slot.group()[0]
    if name not in fields:
        raise _missing(template, name, fields)
    several = _choices(fields, name, choice)
    if several:
        return several[0 if rng is None else int(rng.integers(len(several)))]
    value = fields[name]
    if not isinstance(value, (list, tuple)):
        return _text(value, name)
    items = _texts(value, name)
    if rng is not None and len(items) > 1 and choice is None:
        items = [items[i] for i in rng.permutation(len(items))[: rng.integers(1, len(items) + 1)]]
    return ", ".join(items)


def _missing(template: str, name: str, fields: Mapping[str, Any]) -> UserError:
    """The error of a field that a sample lacks. A caption that cannot be used is named, where `{txt}` stands for it."""
    others = (other for other in CAPTION_FIELDS if not isinstance(fields.get(other, ""), str))
    unusable = next(others, None) if name == "txt" else None
    if unusable is not None:
        kind = _no_text(fields[unusable]) or "a number"
        return UserError(f"the caption is no text: field {unusable!r} is {kind}")
    known = ", ".join(sorted(fields)) or "none"
    return UserError(f"caption template {template!r} names the field {name!r}; the sample has: {known}")


def _choices(fields: Mapping[str, Any], name: str, choice: str | None) -> list[str]:
    """The captions of a field of which one is drawn. Empty: it has one, or holds tags."""
    value = fields[name]
    if name == "txt" and isinstance(value, str) and choice != "all":
        found = sample_captions(fields)
        return found if len(found) > 1 else []
    if not isinstance(value, (list, tuple)) or choice == "all":
        return []
    items = _texts(value, name)
    known = name in CAPTION_FIELDS or all(len(item.split()) >= _CAPTION_WORDS for item in items)
    return items if choice == "one" or known else []


def _texts(value: Sequence[Any], name: str) -> list[str]:
    """The texts of a list, without its nulls. Raises UserError if nothing but nulls is in it."""
    items = [_text(item, name) for item in value if item is not None]
    if value and not items:
        raise UserError(f"the field {name!r} holds no text: its list has nothing but null")
    return items


def _text(value: Any, name: str) -> str:
    """A text or number as text; a caption is no number.

    Raises UserError for null, NaN, truth values, objects and null characters.
    """
    kind = _no_text(value)
    if name == "txt" and (kind is not None or not isinstance(value, str)):
        raise UserError(f"the caption is no text: it is {kind or 'a number'}")
    if kind is not None:
        raise UserError(f"the field {name!r} is no text: it is {kind}")
    text = str(value)
    if "\0" in text:
        raise UserError(f"{NULLS}: field {name!r}")
    return text


def _no_text(value: Any) -> str | None:
    """The kind of a value that never becomes words; None for texts and numbers."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, (list, tuple)):
        return "a list"
    return "not a number" if isinstance(value, float) and not math.isfinite(value) else None


def _name(slot: re.Match[str], template: str) -> tuple[str | None, str | None]:
    """Field name of a slot, and the choice behind it, `one` or `all`; no name for a doubled brace."""
    if slot.group() in ("{{", "}}"):
        return None, None
    name: str | None = slot.group(1)
    if name is None or _NAME.fullmatch(name) is None:
        raise UserError(
            f"caption template {template!r} is malformed at {slot.group()!r}; "
            "a field is a plain name in braces, for example {txt}, and a plain brace is doubled"
        )
    field, _, choice = name.partition("|")
    return field, choice or None
