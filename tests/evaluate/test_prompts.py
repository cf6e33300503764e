"""Class names and templates from files and from open_clip."""

import json
from pathlib import Path

import pytest

from mmssl.errors import UserError
from mmssl.evaluate.prompts import fill, imagenet_classnames, imagenet_templates, read_classnames, read_templates


def test_fill_puts_the_name_everywhere_and_keeps_other_braces() -> None:
    """Every `{c}` becomes the name; other braces stay, which `str.format` would refuse."""
    assert fill(["cat"], ("a {c}, {c}!", "{ok} {c}")) == [["a cat, cat!", "{ok} cat"]]


def test_a_mark_of_the_encoding_is_no_part_of_a_name(tmp_path: Path) -> None:
    """Files saved with a byte order mark have the same names and templates."""
    path = tmp_path / "names.txt"
    path.write_text("cat\ndog\n", encoding="utf-8-sig")
    assert read_classnames(path) == ("cat", "dog")
    path.write_text("{c}\n", encoding="utf-8-sig")
    assert read_templates(path) == ("{c}",)


def test_class_specific_prompts(tmp_path: Path) -> None:
    """A JSON file gives each class its own prompts, in the classes' order; a class without any is named."""
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps({"dog": ["a dog."], "cat": ["a cat.", "a kitten."]}))
    templates = read_templates(path)
    assert fill(["cat", "dog"], templates) == [["a cat.", "a kitten."], ["a dog."]]
    with pytest.raises(UserError, match="'cow'"):
        fill(["cow"], templates)


def test_files_are_read_line_by_line(tmp_path: Path) -> None:
    """One name or template a line, in any language, with surrounding blanks removed."""
    names, templates = tmp_path / "names.txt", tmp_path / "templates.txt"
    names.write_text(" chat \nchien\n\n", encoding="utf-8")
    templates.write_text("une photo d'un {c}.\n\n{c}: 写真\n", encoding="utf-8")
    assert read_classnames(names) == ("chat", "chien")
    assert read_templates(templates) == ("une photo d'un {c}.", "{c}: 写真")


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "is empty"), ("a\n\nb\n", "line 2 of .* is empty")],
)
def test_bad_class_names_are_one_line(tmp_path: Path, text: str, message: str) -> None:
    """An empty file and an empty line, which would shift the labels, are refused."""
    path = tmp_path / "classnames.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_classnames(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.txt", "\n", "is empty"),
        ("t.txt", "a photo of a {}.", r"has no \{c\}"),
        ("t.json", "{", "not valid JSON"),
        ("t.json", "[]", "must be an object"),
        ("t.json", '{"cat": []}', "'cat'"),
    ],
)
def test_bad_templates_are_one_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    """Templates without a place for the name, and JSON of another form, are refused with the reason."""
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_templates(path)
    assert "\n" not in str(caught.value)


def test_missing_files_are_named(tmp_path: Path) -> None:
    """A file that is not there is named."""
    with pytest.raises(UserError, match=r"no class names at .*nowhere\.txt"):
        read_classnames(tmp_path / "nowhere.txt")
    with pytest.raises(UserError, match=r"no prompt templates at .*nowhere\.txt"):
        read_templates(tmp_path / "nowhere.txt")


def test_imagenet_comes_from_open_clip() -> None:
    """1,000 names, OpenAI's 80 templates and their 7 best, `{c}` where open_clip's functions put the name."""
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    assert read_classnames("imagenet") == imagenet_classnames()
    assert len(imagenet_classnames()) == 1000
    assert read_templates("openai-imagenet") == imagenet_templates()
    assert len(read_templates("simple-imagenet")) == 7
    expected = [template("tench") for template in OPENAI_IMAGENET_TEMPLATES]
    assert fill(["tench"], imagenet_templates()) == [expected]
