"""Patterns name exactly the shards a shell would, and say in one line what is wrong otherwise."""

from pathlib import Path

import fsspec
import pytest
from braceexpand import braceexpand
from hypothesis import given
from hypothesis import strategies as st

from mmssl.data import expand
from mmssl.data.shards import is_remote
from mmssl.data.sources.patterns import braces
from mmssl.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three empty shards and another file."""
    for name in ("a-000.tar", "a-001.tar", "b.tar", "notes.txt"):
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    "pattern",
    [
        "x",
        "{0..3}.tar",
        "{000..12}.tar",
        "{10..7}",
        "{0..10..5}",
        "{-3..3..3}",
        "{a,b}{1..2}",
        "a{b,{c,d}e}f",
        "{a,}x",
        "{one}",
        "s3://b/{00..01}/{x,y}.tar",
    ],
)
def test_braces_expand_like_the_braceexpand_package(pattern: str) -> None:
    """An independent implementation of shell braces gives the same names."""
    assert list(braces(pattern)) == list(braceexpand(pattern))


def test_braces_that_do_not_close_stay_as_they_are() -> None:
    """Like in a shell, where the package gives up."""
    assert list(braces("x{y")) == ["x{y"]
    assert list(braces("x}y{a,b}")) == ["x}ya", "x}yb"]


@given(
    low=st.integers(0, 40),
    high=st.integers(0, 40),
    width=st.integers(1, 5),
    words=st.lists(st.sampled_from("abc"), min_size=2),
)
def test_ranges_and_lists_expand_like_the_braceexpand_package(
    low: int, high: int, width: int, words: list[str]
) -> None:
    """The same for ranges of any width and direction beside lists."""
    pattern = f"p{{{low:0{width}d}..{high:0{width}d}}}-{{{','.join(words)}}}"
    assert list(braces(pattern)) == list(braceexpand(pattern))


def test_every_way_to_name_local_shards(folder: Path) -> None:
    """A brace, a glob, a folder, a list, a file URL and a plain path all name the files."""
    every = [str(folder / name) for name in ("a-000.tar", "a-001.tar", "b.tar")]
    assert expand(f"{folder}/a-{{000..001}}.tar") == every[:2]
    assert expand(f"{folder}/*.tar") == every
    assert expand(str(folder)) == every
    assert expand([f"{folder}/b.tar", f"{folder}/a-*.tar"]) == every
    assert expand(f"file://{folder}/b.tar") == every[2:]
    assert expand(f"{folder}/**/a-00?.tar") == every[:2]


def test_a_file_whose_name_looks_like_a_pattern_is_itself(tmp_path: Path) -> None:
    """An existing file wins over the pattern its name spells."""
    path = tmp_path / "set[1]{a,b}.tar"
    path.touch()
    assert expand(str(path)) == [str(path)]


def test_a_long_list_in_braces_is_no_file_name(folder: Path) -> None:
    """More letters than a file's name may have."""
    names = [f"shard-{number:05d}" for number in range(40)]
    for name in names:
        (folder / f"{name}.tar").touch()
    assert expand(f"{folder}/{{{','.join(names)}}}.tar") == [str(folder / f"{name}.tar") for name in names]


def test_names_are_sorted_whatever_their_order(folder: Path) -> None:
    """The numbering of samples does not depend on how the list was written."""
    assert expand([f"{folder}/b.tar", f"{folder}/a-000.tar"]) == expand([f"{folder}/a-000.tar", f"{folder}/b.tar"])


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("{folder}/a-{{000..002}}.tar", "a-002.tar does not exist"),
        ("{folder}/c-*.tar", "no file matches"),
        ("{folder}/missing.tar", "missing.tar does not exist"),
        ("{folder}/empty", "holds no .tar file"),
        ("{folder}/empty/../pairs.csv", "is a table and no shard; .* mmssl shards pack"),
        ("{folder}/{{0..99999999}}.tar", "more than"),
        ("{folder}/{{0..9999}}{{0..9999}}.tar", "more than"),
        ("pipe:cat x.tar", "allow_pipe"),
        ("https://example.org/*.tar", "does not list"),
        ("nosuchprotocol://bucket/*.tar", "no driver"),
        ("memory://nothing/*.tar", "no file matches"),
        ("{folder}/" + 300 * "x" + ".tar", "does not exist"),
        ("~nobody-of-this-name/x.tar", "no such user"),
    ],
)
def test_errors_name_the_problem_in_one_line(folder: Path, pattern: str, names: str) -> None:
    """What matches nothing, is missing or not allowed is a UserError of one line."""
    (folder / "empty").mkdir()
    (folder / "pairs.csv").touch()
    with pytest.raises(UserError, match=names) as error:
        expand(pattern.format(folder=folder))
    assert "\n" not in str(error.value)


def test_no_pattern_and_shards_named_twice_are_refused(folder: Path) -> None:
    """An empty list names nothing; overlapping patterns would repeat samples."""
    with pytest.raises(UserError, match="no shards"):
        expand([])
    with pytest.raises(UserError, match=r"b\.tar is named twice"):
        expand([f"{folder}/*.tar", f"{folder}/b.tar"])


def test_urls(folder: Path) -> None:
    """Web addresses keep their question marks; other file systems are listed; pipes need leave."""
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
    assert is_remote("pipe:cat")
    assert not is_remote(str(folder))
