"""Patterns expand to the same shards as in a shell; errors are one line."""

import os
import tracemalloc
from pathlib import Path

import braceexpand
import fsspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mmssl.data import expand
from mmssl.data.shards import is_remote
from mmssl.data.sources import braces
from mmssl.data.sources.braces import expand_braces
from mmssl.errors import UserError
from mmssl.types import PipeCommand


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three empty shards and another file."""
    for name in ("a-000.tar", "a-001.tar", "b.tar", "notes.txt"):
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("x", ["x"]),
        ("{0..2}.tar", ["0.tar", "1.tar", "2.tar"]),
        ("{08..10}", ["08", "09", "10"]),
        ("{2..-2..2}", ["2", "0", "-2"]),
        ("{a..c}", ["a", "b", "c"]),
        ("a{b,{c,d}e}f", ["abf", "acef", "adef"]),
        ("{a,}x", ["ax", "x"]),
        ("{one}", ["{one}"]),
        ("s3://b/{00..01}/{x,y}.tar", ["s3://b/00/x.tar", "s3://b/00/y.tar", "s3://b/01/x.tar", "s3://b/01/y.tar"]),
        ("C:\\{a,b}", ["C:\\a", "C:\\b"]),
        ("x{y", ["x{y"]),
        ("x}y{a,b}", ["x}y{a,b}"]),
    ],
)
def test_braces_expand_like_in_a_shell(pattern: str, names: list[str]) -> None:
    """Ranges, lists and nested ones; unbalanced braces, single words and backslashes stay as they are."""
    assert expand_braces(pattern) == names


PIECES = st.sampled_from(["{", "}", ",", "{0..3}", "{07..1..2}", "{a..c}", "{c..A..9}", "{a,b}", "x", "..", "1", "-2"])


@given(st.lists(PIECES, max_size=12).map("".join), st.integers(1, 20))
@settings(deadline=None)
@example("}a{b,c}d{e", 1)
@example("{{1..2},{a,}{b..d}}{x}", 13)
def test_the_number_of_names_is_known_before_they_are_made(pattern: str, most: int) -> None:
    """A pattern of any form is expanded as braceexpand does, and refused if that gives more names than the limit."""
    try:
        names = list(braceexpand.braceexpand(pattern, escape=False))
    except braceexpand.UnbalancedBracesError:
        names = [pattern]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(braces, "_MAX_NAMES", most)
        if len(names) <= most:
            assert expand_braces(pattern) == names
        else:
            with pytest.raises(UserError, match=f"more than {most} shards"):
                expand_braces(pattern)


DIGITS = "{0..9}"
BOMBS = {
    "ranges": (8 * DIGITS, "2,000,000"),
    "nested": ("{{" + 8 * DIGITS + ",a},b}", "2,000,000"),
    "nested without a comma": ("{" + 8 * DIGITS + "}", "2,000,000"),
    "many lists": (5000 * "{a,b}", "2,000,000"),
    "many digits": ("{0..1" + 5000 * "0" + "}", "2,000,000"),
    "deep": (20_000 * "{" + "a,b" + 20_000 * "}", "20,000 deep"),
    "long names": ("{0..1999999}" + 1000 * "x", "a GiB"),
    "levels": (9 * "{" + "{0..1900000}" + 9 * ",a}", "a GiB"),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_patterns_that_explode_are_refused_at_once(bomb: str) -> None:
    """However braces are combined, the refusal is one short line and takes less than 32 MB."""
    pattern, reason = BOMBS[bomb]
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=reason) as error:
            expand([f"s3://bucket/{pattern}.tar"])
        assert tracemalloc.get_traced_memory()[1] < 32e6
    finally:
        tracemalloc.stop()
    assert len(str(error.value)) < 500


def test_every_way_to_name_local_shards(folder: Path) -> None:
    """Braces, globs, folders, lists, file URLs and plain paths give the same files."""
    every = [str(folder / name) for name in ("a-000.tar", "a-001.tar", "b.tar")]
    assert expand(f"{folder}/a-{{000..001}}.tar") == every[:2]
    assert expand(f"{folder}/*.tar") == every
    assert expand(str(folder)) == every
    assert expand([f"{folder}/b.tar", f"{folder}/a-*.tar"]) == every
    assert expand(f"file://{folder}/b.tar") == every[2:]
    assert expand(f"{folder}/**/a-00?.tar") == every[:2]


def test_a_file_whose_name_looks_like_a_pattern_is_itself(tmp_path: Path) -> None:
    """An existing file takes precedence over the pattern in its name."""
    path = tmp_path / "set[1]{a,b}.tar"
    path.touch()
    assert expand(str(path)) == [str(path)]


def test_a_long_list_in_braces_is_no_file_name(folder: Path) -> None:
    """A pattern longer than the longest file name is expanded."""
    names = [f"shard-{number:05d}" for number in range(40)]
    for name in names:
        (folder / f"{name}.tar").touch()
    assert expand(f"{folder}/{{{','.join(names)}}}.tar") == [str(folder / f"{name}.tar") for name in names]


def test_names_are_sorted_whatever_their_order(folder: Path) -> None:
    """The numbering of samples does not depend on the order of the list."""
    assert expand([f"{folder}/b.tar", f"{folder}/a-000.tar"]) == expand([f"{folder}/a-000.tar", f"{folder}/b.tar"])


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("{folder}/a-{{000..002}}.tar", "a-002.tar does not exist"),
        ("{folder}/c-*.tar", "no file matches"),
        ("{folder}/missing.tar", "missing.tar does not exist"),
        ("{folder}/a-0.tar::{folder}/b.tar", r"give several patterns one by one, data.train=\[A,B\]"),
        ("{folder}/empty", "has no .tar file"),
        ("{folder}/empty/../pairs.csv", "is a table, not a shard; .* mmssl shards pack"),
        ("{folder}/{{0..99999999}}.tar", "more than"),
        ("{folder}/{{0..9999}}{{0..9999}}.tar", "more than"),
        ("{folder}/{{{{1..99999999}},a}}.tar", "more than"),
        ("pipe:cat x.tar", "allow_pipe"),
        ("https://example.org/*.tar", "does not list"),
        ("nosuchprotocol://bucket/*.tar", "no driver"),
        ("memory://nothing/*.tar", "no file matches"),
        ("{folder}/" + 300 * "x" + ".tar", "does not exist"),
        ("~nobody-of-this-name/x.tar", "unknown home folder"),
    ],
)
def test_errors_name_the_problem_in_one_line(folder: Path, pattern: str, names: str) -> None:
    """Patterns that match nothing, are missing or not allowed are one-line UserErrors."""
    (folder / "empty").mkdir()
    (folder / "pairs.csv").touch()
    with pytest.raises(UserError, match=names) as error:
        expand(pattern.format(folder=folder))
    assert "\n" not in str(error.value)


def test_no_pattern_and_shards_named_twice_are_refused(folder: Path) -> None:
    """An empty list and overlapping patterns are errors."""
    with pytest.raises(UserError, match="no shards"):
        expand([])
    with pytest.raises(UserError, match=r"b\.tar is given twice"):
        expand([f"{folder}/*.tar", f"{folder}/b.tar"])


def test_a_file_under_several_names_counts_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Links, hard links and other paths of one shard are the same shard: it is read once, and the log says so."""
    (folder / "link.tar").symlink_to("b.tar")
    os.link(folder / "b.tar", folder / "z.tar")
    names = expand([f"{folder}/b.tar", f"{folder}/link.tar", f"{folder}/z.tar", f"{folder}/../{folder.name}/b.tar"])
    assert [Path(name).resolve() for name in names] == [folder / "b.tar"]
    assert "is another name of" in caplog.text
    assert "so are 2 more" in caplog.text


def test_urls(folder: Path) -> None:
    """Web addresses keep their query; other file systems are listed; pipes are expanded if allowed."""
    assert expand("https://example.org/{0..1}.tar?token=a*".replace("*", "")) == [
        "https://example.org/0.tar?token=a",
        "https://example.org/1.tar?token=a",
    ]
    memory = fsspec.filesystem("memory")
    for name in ("y.tar", "x.tar"):
        memory.pipe_file(f"/patterns/{name}", b"")
    assert expand("memory://patterns/*.tar") == ["memory:///patterns/x.tar", "memory:///patterns/y.tar"]
    assert expand("s3://bucket/{a,b}.tar") == ["s3://bucket/a.tar", "s3://bucket/b.tar"]
    assert expand("pipe:cat {0..1}.tar", allow_pipe=True) == ["pipe:cat 0.tar", "pipe:cat 1.tar"]
    assert is_remote("s3://a")
    assert is_remote(PipeCommand("pipe:cat"))
    assert not is_remote("pipe:cat")
    assert not is_remote(str(folder))
