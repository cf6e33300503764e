"""Conditions on stored fields, other number formats, first dimensions, and FAISS."""

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mmssl
from mmssl.apps.search import Index, embed_shards, exact_nearest, write_parquet
from mmssl.apps.search.fields import Condition
from mmssl.cli import main
from mmssl.errors import UserError
from mmssl.inference import stored
from tests.cli.test_main import main_ok
from tests.helpers.export_models import own
from tests.helpers.toy_encoder import pack, paint

COUNT = 70
STYLES = ("noto", "twemoji", "größe = 3")


def fields(number: int) -> dict[str, object]:
    """Fields of several kinds; some are missing in some samples."""
    found: dict[str, object] = {
        "style": STYLES[number % 3],
        "year": 1880 + number if number % 4 else str(1880 + number),
        "price": number / 8,
        "coloured": number % 2 == 0,
        "tags": [f"tag {number % 5}", "all", 7] if number % 6 else [],
        "long": "x" * 300,
        "nested": {"a": 1},
        "caption": "never a field",
    }
    return found if number % 7 else {"caption": "?", "lone": "\ud800 half"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, three shards, and an index of them with a graph."""
    home = tmp_path_factory.mktemp("fields")
    own().save(home / "model")
    records = [
        {"png": paint(257 * n), "txt": f"Square {n % 9}", "json": fields(n), "cls": str(n % 4)} for n in range(COUNT)
    ]
    bounds = ((0, 0, 30), (1, 30, 31), (2, 31, COUNT))
    names = [str(pack(home / f"{part}.tar", records[start:stop])) for part, start, stop in bounds]
    embed_shards(own(), names, home / "index")
    Index(home / "index").build_graph()
    return home


def number(value: object) -> float | None:
    try:
        return float(str(value))
    except ValueError:
        return None


CONDITIONS = {
    "style=noto": lambda f: f.get("style") == "noto",
    "style != noto": lambda f: f.get("style") != "noto",
    "style=größe = 3": lambda f: f.get("style") == "größe = 3",
    "year>=1900": lambda f: "year" in f and int(f["year"]) >= 1900,
    "year<1890.5": lambda f: "year" in f and int(f["year"]) < 1890.5,
    "price=0.50": lambda f: f.get("price") == 0.5,
    "price <= 1e0": lambda f: "price" in f and f["price"] <= 1,
    "coloured=true": lambda f: f.get("coloured") is True,
    "tags=tag 3": lambda f: "tag 3" in f.get("tags", []),
    "tags!=tag 3": lambda f: "tag 3" not in f.get("tags", []),
    "tags~TAG": lambda f: any("tag" in str(tag) for tag in f.get("tags", [])),
    "tags=7.0": lambda f: 7 in f.get("tags", []),
    "style>noto": lambda f: f.get("style", "") > "noto",
    "style=nothing": lambda f: False,
    "cls>2": lambda f: f["cls"] > 2,
    "caption~square 1": lambda f: f["number"] % 9 == 1,
    "shard~1.tar": lambda f: f["number"] == 30,
    "key!=00003": lambda f: f["key"] != "00003",
}


@pytest.mark.parametrize("where", [[text] for text in CONDITIONS] + [["style=noto", "year>=1900", "tags=all"]], ids=str)
def test_a_search_with_conditions_is_one_among_the_images_that_meet_them(home: Path, where: list[str]) -> None:
    """Rows and cosines are those of sorting all products of the images for which the same comparison in Python holds,
    also where the index has a graph; the command finds the same."""
    index = Index(home / "index")
    hits = index.hits(range(COUNT), [0.0] * COUNT)
    data = [{**fields(n), "number": n, "cls": n % 4, "key": hits[n].key} for n in range(COUNT)]
    meets = [n for n in range(COUNT) if all(CONDITIONS[text](data[n]) for text in where if text in CONDITIONS)]
    if "tags=all" in where:
        meets = [n for n in meets if "all" in data[n].get("tags", [])]
    assert index.select(where).tolist() == meets
    query = own().encode_text(["a red square", "green"]).numpy()
    rows, similarities = index.nearest(query, 5, where=where)
    products = query @ np.stack([index.embedding(n) for n in range(COUNT)]).T
    for found, cosines, product in zip(rows, similarities, products, strict=True):
        expected = sorted(meets, key=lambda n: -product[n])[:5]
        assert len(found) == len(expected)
        assert set(found.tolist()) <= set(meets)
        np.testing.assert_allclose(cosines, product[expected], atol=1e-5)
        np.testing.assert_allclose(product[found], product[expected], atol=1e-5)  # equal ones in any order


def test_hits_carry_their_fields(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command's JSON has the fields of each hit, a list where there are several values, and only hits that meet
    the conditions; long and nested values are not stored."""
    command = ["search", str(home / "model"), str(home / "index"), "red", "--json", "-k", "50"]
    capsys.readouterr()
    main_ok([*command, "--where", "style=noto", "--where", "year>1900", "--distinct", "1"])
    hits = json.loads(capsys.readouterr().out)
    assert hits
    for hit in hits:
        source = fields(int(hit["key"]) + {"0": 0, "1": 30, "2": 31}[Path(hit["shard"]).stem])
        assert hit["fields"]["style"] == source["style"] == "noto"
        assert hit["fields"]["year"] == str(source["year"])
        assert hit["fields"].get("tags", []) == [str(tag) for tag in source["tags"]]  # type: ignore[attr-defined]
        assert not {"long", "nested", "caption"} & hit["fields"].keys()
    assert Index(home / "index").hits([0], [1.0])[0].fields == {"lone": "? half", "cls": "0"}


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("=x", "is not a condition"),
        ("style", "is not a condition"),
        ("__import__('os')", "is not a condition"),
        ("color=red", r"the index has no field 'color'; it has key, caption, shard, cls, coloured.*tags"),
        ("long=x", "no field 'long'"),
    ],
)
def test_a_wrong_condition_is_said(home: Path, where: str, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What cannot be read, and a field that is not stored, are errors; the latter names those that are."""
    with pytest.raises(UserError, match=reason):
        Index(home / "index").select([where])
    with pytest.raises(SystemExit):  # before a model is loaded: there is none
        main(["search", str(home / "none"), str(home / "index"), "red", "--where", where])
    assert "--where" in capsys.readouterr().err


def test_nothing_found_is_said(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where no image meets the conditions the command says so, in place of an empty table; JSON stays a list. An index
    without any usable image is an error."""
    command = ["search", str(home / "model"), str(home / "index"), "red", "--where", "style=nothing"]
    capsys.readouterr()
    main_ok(command)
    assert capsys.readouterr().out == "no image meets the conditions\n"
    main_ok([*command, "--json"])
    assert json.loads(capsys.readouterr().out) == []
    (tmp_path / "a.png").write_bytes(paint(3))
    with pytest.raises(SystemExit) as caught:
        main(["embed", str(home / "model"), str(tmp_path / "a.png"), "--out", str(tmp_path / "i")])
    assert caught.value.code == 2
    assert "no image could be used" in capsys.readouterr().err


@given(st.text(max_size=12), st.sampled_from(["=", "!=", "<", "<=", ">", ">=", "~"]), st.text(max_size=12))
def test_any_condition_is_read_or_refused(name: str, operator: str, value: str) -> None:
    """Whatever the text, nothing but UserError is raised, and what is read is compared with any value."""
    try:
        condition = Condition.parse(name + operator + value)
    except UserError:
        return
    assert isinstance(condition.accepts(value), bool)
    assert isinstance(condition.accepts("3"), bool)


def test_long_numbers_stay_different() -> None:
    """Ids that are the same as floats are not the same."""
    assert not Condition.parse("id=12345678901234567890").accepts("12345678901234567891")
    assert Condition.parse("id<12345678901234567891").accepts("12345678901234567890")


def test_fields_are_chosen(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--fields stores those named, and says which no image has; the folder keeps them; others embed again."""
    command = ["embed", str(home / "model"), str(home / "*.tar"), "--out", str(tmp_path / "i")]
    capsys.readouterr()
    main_ok([*command, "--fields", "style, colour"])
    assert "no image has the field colour" in capsys.readouterr().out
    main_ok(command)
    assert " images, 0 of them embedded now" in capsys.readouterr().out
    assert Index(tmp_path / "i").fields == ["style"]
    main_ok([*command, "--fields", ""])
    assert f"{COUNT} of them embedded now" in capsys.readouterr().out
    assert Index(tmp_path / "i").fields == []


def test_eight_bits_keep_the_direction(home: Path, tmp_path: Path) -> None:
    """An int8 index has half the bytes; each vector is the float32 one to a cosine of 0.9999; search, by the graph too,
    sorts the products of these vectors; another format embeds again."""
    names = [str(home / f"{part}.tar") for part in range(3)]
    done = embed_shards(own(), names, tmp_path / "i", dtype="int8")
    index, wide = Index(tmp_path / "i"), Index(home / "index")
    assert {part.dtype for part in index.parts} == {np.dtype(np.int8)}
    vectors = np.stack([index.embedding(row) for row in range(COUNT)])
    exact = np.stack([wide.embedding(row) for row in range(COUNT)])
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert (vectors * exact).sum(1).min() > 0.9999
    query = own().encode_text("a red square").numpy()
    index.build_graph()
    for found in (index.nearest(query, COUNT, exact=True), Index(tmp_path / "i").nearest(query, COUNT)):
        np.testing.assert_allclose(found[1][0], np.sort(query[0] @ vectors.T)[::-1], atol=1e-5)
        np.testing.assert_allclose(found[1][0], vectors[found[0][0]] @ query[0], atol=1e-5)
    assert embed_shards(own(), names, tmp_path / "i").images == 0
    assert embed_shards(own(), names, tmp_path / "i", dtype="float16").images == done.images == COUNT


def test_the_first_dimensions_of_an_index(home: Path, tmp_path: Path) -> None:
    """Searched with 8 dimensions, an index finds what one that was embedded with 8 dimensions finds, to the rounding of
    float16; it cannot have more than are stored; and the graph, which has all, is left aside."""
    short = own().first_dimensions(8)
    embed_shards(short, [str(home / f"{part}.tar") for part in range(3)], tmp_path / "i")
    index, expected = Index(home / "index", 8), Index(tmp_path / "i")
    model = index.fit(own())
    assert model.config.embed_dim == index.dim == 8
    query = model.encode_text("a red square").numpy()
    found, wanted = index.nearest(query, COUNT), expected.nearest(query, COUNT)
    np.testing.assert_allclose(found[1], wanted[1], atol=2e-3)
    exact = np.stack([expected.embedding(row) for row in range(COUNT)]) @ query[0]
    np.testing.assert_allclose(found[1][0], exact[found[0][0]], atol=2e-3)
    with pytest.raises(UserError, match=r"--dim 99: .* 16 dimensions; give 1 to 16"):
        Index(home / "index", 99)


def test_the_table_has_the_fields(home: Path, tmp_path: Path) -> None:
    """Fields with one value each are texts, others lists; the rows are those of the index."""
    index = Index(home / "index")
    write_parquet(index, tmp_path / "v.parquet")
    rows = pyarrow.parquet.read_table(tmp_path / "v.parquet").to_pylist()
    for row, hit in zip(rows, index.hits(range(COUNT), [0.0] * COUNT), strict=True):
        assert (row["shard"], row["key"], row["caption"]) == (hit.shard, hit.key, hit.caption)
        assert row["style"] == hit.fields.get("style")
        assert (row["tags"] or []) == hit.fields.get("tags", [])


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_faiss_answers_as_the_index(home: Path, tmp_path: Path, dtype: stored.Dtype) -> None:
    """The file that FAISS reads gives rows and cosines of the exact search, under the numbers of the rows."""
    faiss = pytest.importorskip("faiss")
    command = ["embed", str(home / "model"), str(home / "*.tar"), "--out", str(tmp_path / "i"), "--dtype", dtype]
    main_ok([*command, "--faiss", str(tmp_path / "v.faiss")])
    index = Index(tmp_path / "i")
    queries = mmssl.load(home / "model").encode_text(["a red square", "green", "blue"]).numpy()
    cosines, rows = faiss.read_index(str(tmp_path / "v.faiss")).search(queries, 9)
    expected = exact_nearest(queries, index.parts, 9)
    np.testing.assert_allclose(cosines, expected[1], atol=1e-5)
    products = queries @ np.stack([index.embedding(row) for row in range(COUNT)]).T
    np.testing.assert_allclose(np.take_along_axis(products, rows, 1), cosines, atol=1e-5)


def test_an_int8_part_of_zeros_is_no_division_by_zero() -> None:
    """A vector of zeros, which no model makes but a file can hold, stays one."""
    zeros: npt.NDArray[np.int8] = np.zeros((2, 4), np.int8)
    assert np.array_equal(stored.as_unit(zeros), np.zeros((2, 4), np.float32))
    assert np.array_equal(stored.rounded(np.zeros((2, 4), np.float32), "int8"), zeros)
