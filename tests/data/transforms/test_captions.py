"""Caption templates: what they render, and what they refuse."""

import math
from collections import Counter
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from open_clip.tokenizer import basic_clean, whitespace_clean

from mmssl.data.transforms.captions import (
    check_templates,
    clean_caption,
    every_caption,
    further_captions,
    render_caption,
)
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


@pytest.mark.parametrize("weights", [None, [1.0, 5.0, 1.0]])
def test_an_empty_template_gives_way(weights: list[float] | None) -> None:
    """Where `{tags}` renders nothing the others are drawn in proportion; only if all are empty is the caption empty."""
    fields = {"txt": "a red fox", "label": "fox", "tags": [], "none": "  "}
    templates = ["{txt}", "{tags}", "{label}"]
    drawn = Counter(render_caption(fields, templates, np.random.default_rng(seed), weights) for seed in range(900))
    assert set(drawn) == {"a red fox", "fox"}
    assert abs(drawn["fox"] - 450) < 60
    assert render_caption(fields, ["{tags}", "{none}", "{label}"], None) == "fox"
    assert not render_caption(fields, ["{tags}", "{none}"], np.random.default_rng(0)).strip()


def test_further_captions_are_never_empty() -> None:
    """A template that renders nothing adds no caption to a sample."""
    fields = {"txt": "a red fox", "label": "fox", "tags": []}
    rng = np.random.default_rng(0)
    assert set(further_captions(fields, ["{txt}", "{tags}", "{label}"], "fox", 3, rng)) == {"a red fox", "fox"}


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


@given(st.dictionaries(st.text("abc_é", min_size=1), st.text(st.characters(exclude_characters="\0"))), st.text())
def test_any_text_around_fields_survives(fields: dict[str, str], around: str) -> None:
    """Text around fields comes through unchanged once its braces are doubled; so do the fields, unless binary."""
    plain = around.replace("{", "{{").replace("}", "}}")
    template = plain + "".join("{" + name + "}" for name in fields) + plain
    check_templates([template])
    assert render_caption(fields, [template], None) == around + "".join(fields.values()) + around


def test_null_characters_are_no_text() -> None:
    """UTF-16 that was read as UTF-8 is a bad sample, in a text and in a list."""
    for value in ("a\0 \0c\0", ["a cat", "a\0 \0c\0"]):
        with pytest.raises(UserError, match="null characters: field 'caption'"):
            render_caption({"caption": value}, ["{caption}"], None)


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


SENTENCES = ["Two people watch a dog.", "The brown dog is playing.", "a dog, and people"]


@pytest.mark.parametrize(
    ("fields", "template"),
    [
        ({"captions": SENTENCES}, "{captions}"),
        ({"txt": SENTENCES[0], "caption": SENTENCES}, "{txt}"),
        ({"txt": SENTENCES[0], "captions": [*SENTENCES, None]}, "{txt}"),
        ({"txt": "\n".join(SENTENCES) + "\n"}, "{txt}"),
        ({"txt": "\r\n\r\n".join(SENTENCES)}, "{txt}"),
        ({"said_by_five": SENTENCES}, "{said_by_five}"),
        ({"raw": SENTENCES, "n": 3}, "{raw}"),
        ({"x": SENTENCES}, "{x|one}"),
    ],
)
def test_several_captions_are_drawn_one_at_a_time(fields: dict[str, Any], template: str) -> None:
    """A list of captions, or the lines of a text, gives each of its captions equally often and never two in one.
    Without randomness it gives the first."""
    rng = np.random.default_rng(0)
    counts = Counter(render_caption(fields, [template], rng) for _ in range(600))
    assert set(counts) == set(SENTENCES)
    assert min(counts.values()) > 150
    assert render_caption(fields, [template], None) == SENTENCES[0]
    assert every_caption(fields, template) == SENTENCES
    around = [f"<{text}>" for text in SENTENCES]
    assert {render_caption(fields, [f"<{template}>"], rng) for _ in range(100)} == set(around)
    assert every_caption(fields, f"<{template}>") == around


def test_a_text_that_is_one_caption_stays_whole() -> None:
    """A list of one text, under a usual name, tells that a text of several lines is one caption."""
    fields = {"txt": "one caption\nof two lines", "captions": ["one caption\nof two lines"]}
    assert render_caption(fields, ["{txt}"], np.random.default_rng(0)) == fields["txt"]
    assert every_caption(fields, "{txt}") == [fields["txt"]]


@pytest.mark.parametrize("template", ["{tags}", "{tags|all}"])
def test_tags_are_joined(template: str) -> None:
    """Lists of words are tags: in full without randomness, and always with `all`."""
    assert every_caption(FIELDS, template) == [", ".join(FIELDS["tags"])]
    drawn = {render_caption(FIELDS, [template], np.random.default_rng(seed)) for seed in range(50)}
    assert (len(drawn) == 1) == (template == "{tags|all}")
    assert {render_caption(FIELDS, ["{tags|one}"], np.random.default_rng(seed)) for seed in range(50)} == set(
        FIELDS["tags"]
    )


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "null"),
        (math.nan, "not a number"),
        (math.inf, "not a number"),
        (True, "true"),
        (False, "false"),
        ({"en": "a cat"}, "an object"),
        ([None, None], "nothing but null"),
        ([{"raw": "a cat"}], "an object"),
    ],
)
@pytest.mark.parametrize("name", ["caption", "tags"])
def test_values_that_are_no_text_are_refused(value: Any, words: str, name: str) -> None:
    """Null, NaN, truth values and objects never become words of a caption."""
    for rng in (None, np.random.default_rng(0)):
        with pytest.raises(UserError, match=f"'{name}'.*{words}"):
            render_caption({name: value}, [f"a {{{name}}}"], rng)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"caption": None}, "the caption is no text: field 'caption' is null"),
        ({"title": 7, "n": 1}, "the caption is no text: field 'title' is a number"),
        ({"captions": [{"raw": "a"}]}, "the caption is no text: field 'captions' is a list"),
        ({"txt": None}, "the caption is no text: it is null"),
        ({"txt": 5}, "the caption is no text: it is a number"),
        ({"label": "cat"}, "names the field 'txt'; the sample has: label"),
    ],
)
def test_a_caption_that_is_no_text_is_named(fields: dict[str, Any], words: str) -> None:
    """Where `{txt}` has nothing to stand for, the reason names the value that should have been the caption."""
    for rng in (None, np.random.default_rng(0)):
        with pytest.raises(UserError, match=words):
            render_caption(fields, ["{txt}"], rng)
