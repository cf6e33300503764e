"""Caption templates: what they render, and what they refuse."""

from collections import Counter
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from open_clip.tokenizer import basic_clean, whitespace_clean

from mmssl.data.transforms.captions import check_templates, clean_caption, render_caption
from mmssl.errors import UserError

FIELDS: dict[str, Any] = {
    "txt": "a red fox",
    "label": "fox",
    "tags": ["animal", "red", "fur"],
    "year": 2020,
    "none": [],
}


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{txt}", "a red fox"),
        ("{label}: {tags}", "fox: animal, red, fur"),
        ("{label} ({year})", "fox (2020)"),
        ("{{{label}}} {{}}", "{fox} {}"),
        ("no field", "no field"),
        ("[{none}]", "[]"),
    ],
)
def test_without_a_generator_everything_is_rendered(template: str, expected: str) -> None:
    """Without randomness the first template counts and lists are in full, in their order."""
    assert render_caption(FIELDS, [template, "{missing}"], None) == expected


def test_templates_are_drawn_evenly() -> None:
    """Each template is drawn at its share, and the same generator draws the same."""
    templates = ["{txt}", "{label}", "{year}"]
    counts = Counter(render_caption(FIELDS, templates, np.random.default_rng(seed)) for seed in range(900))
    assert set(counts) == {"a red fox", "fox", "2020"}
    assert min(counts.values()) > 240
    again = [render_caption(FIELDS, templates, np.random.default_rng(5)) for _ in range(3)]
    assert len(set(again)) == 1


def test_lists_render_every_subset_in_every_order() -> None:
    """A list of three gives each of its 15 ordered non-empty selections, each size equally often."""
    rng = np.random.default_rng(0)
    counts = Counter(render_caption(FIELDS, ["{tags}"], rng) for _ in range(3000))
    assert set(counts) == {", ".join(p) for size in (1, 2, 3) for p in permutations(FIELDS["tags"], size)}
    sizes = Counter(selection.count(",") for selection in counts.elements())
    assert all(abs(count - 1000) < 120 for count in sizes.values())


def test_unknown_fields_are_named() -> None:
    """A field that the sample lacks is an error that lists the ones it has."""
    with pytest.raises(UserError, match=r"'lable'; the sample has: label, none, tags, txt, year"):
        render_caption(FIELDS, ["{lable}"], None)


class Trap:
    """An object that notices being looked into."""

    secret = "leaked"

    def __str__(self) -> str:
        return "plain"

    def __format__(self, spec: str) -> str:
        raise AssertionError("formatted")


@pytest.mark.parametrize(
    "template",
    [
        "{a.secret}",
        "{a[0]}",
        "{a!r}",
        "{a:>9}",
        "{a.__class__}",
        "{}",
        "{",
        "}",
        "{a",
        "{{a}",
        "{a}}",
        "{a{b}}",
    ],
)
def test_only_plain_names_are_fields(template: str) -> None:
    """Attributes, indices, conversions, formats and stray braces are refused, before and while rendering."""
    with pytest.raises(UserError, match="malformed"):
        check_templates(["{txt}", template])
    with pytest.raises(UserError, match="malformed"):
        render_caption({"a": Trap(), "b": "x"}, [template], None)


def test_values_are_only_turned_into_text() -> None:
    """A value is rendered by str, never formatted, and braces in data are data."""
    assert render_caption({"a": Trap()}, ["{a}"], None) == "plain"
    assert render_caption({"a": "{b} {c.d}", "b": "no"}, ["{a}"], None) == "{b} {c.d}"


@given(st.dictionaries(st.text("abc_é", min_size=1), st.text()), st.text())
def test_any_text_around_fields_survives(fields: dict[str, str], around: str) -> None:
    """Text around fields comes through unchanged once its braces are doubled; so do the fields."""
    plain = around.replace("{", "{{").replace("}", "}}")
    template = plain + "".join("{" + name + "}" for name in fields) + plain
    check_templates([template])
    assert render_caption(fields, [template], None) == around + "".join(fields.values()) + around


@pytest.mark.parametrize(
    "text",
    [
        "  a   photo\n\tof it ",
        "fish &amp; chips &lt;3",
        "twice &amp;amp; escaped",
        "cafÃ© crÃ¨me",
        "“curly” quotes… and ﬁgures",
        "日本語　の　説明",
        "AT&T",
        "",
    ],
)
def test_cleaning_equals_openclips(text: str) -> None:
    """Captions are cleaned exactly as open_clip's tokenizer cleans them before it lower-cases."""
    assert clean_caption(text) == whitespace_clean(basic_clean(text))


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126)))
def test_ascii_needs_no_mending(text: str) -> None:
    """On printable ASCII, leaving ftfy out changes nothing."""
    assert clean_caption(text) == whitespace_clean(basic_clean(text))
