"""Stored vectors are the model's, whole after any interruption, and the nearest are found."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet
import pytest
import torch
from PIL import Image

import mmssl
from mmssl.apps.search import Graph, Index, embed_shards, encode_query, exact_nearest
from mmssl.cli import main
from mmssl.data import expand, iter_samples
from mmssl.distributed import World
from mmssl.errors import UserError
from tests.helpers.export_models import own
from tests.helpers.tiny_runs import write_pairs
from tests.helpers.toy_encoder import pack, paint


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 images in two tars."""
    return write_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def model() -> mmssl.Model:
    return own()


@pytest.fixture(scope="module")
def index(model: mmssl.Model, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("index") / "i"
    assert embed_shards(model, expand([str(shards / "*.tar")]), folder).images == 48
    return folder


def test_an_index_holds_every_images_vector(index: Path, model: mmssl.Model, shards: Path) -> None:
    """float16 rows equal the model's own vectors, in the order of the shards; key, shard and caption are in Parquet."""
    samples = list(iter_samples(expand([str(shards / "*.tar")])))
    expected = model.encode_image([sample.image for sample in samples])
    stored = np.concatenate([np.load(path) for path in sorted((index / "parts").glob("*.npy"))])
    assert stored.dtype == np.float16
    np.testing.assert_allclose(stored, expected.numpy(), atol=1e-3)
    tables = [pyarrow.parquet.read_table(path).to_pylist() for path in sorted((index / "parts").glob("*.parquet"))]
    rows = [row for part in tables for row in part]
    assert [row["key"] for row in rows] == [sample.key for sample in samples]
    assert [row["caption"] for row in rows] == [sample.fields["txt"] for sample in samples]
    hits = Index(index).hits([0, 24, 47], [1, 1, 1])
    assert [(hit.shard, hit.key) for hit in hits] == [(samples[i].shard, samples[i].key) for i in (0, 24, 47)]


def test_an_interrupted_embedding_goes_on(model: mmssl.Model, shards: Path, tmp_path: Path) -> None:
    """What a killed run left, a half-written part and a missing one, is made whole; what is there is not made again."""
    names = expand([str(shards / "*.tar")])
    embed_shards(model, names, tmp_path / "i")
    parts = tmp_path / "i" / "parts"
    whole = {path.name: path.read_bytes() for path in parts.iterdir()}
    (parts / "000001.npy").unlink()
    (parts / ".000001.npy.partial").write_bytes(b"half")
    with pytest.raises(UserError, match="lacks 1 of 2 shards"):
        Index(tmp_path / "i")
    done = embed_shards(model, names, tmp_path / "i")
    assert (done.images, done.kept) == (24, 1)
    assert {path.name: path.read_bytes() for path in parts.iterdir() if path.suffix != ".partial"} == whole


def test_shards_without_a_usable_image_block_nothing(model: mmssl.Model, shards: Path, tmp_path: Path) -> None:
    """An empty shard and one of broken images among others become empty parts: their samples are counted, and the rest
    is found. Beyond the limit the embedding stops, and what is stored stays."""
    broken = pack(tmp_path / "broken.tar", [{"png": b"no image", "txt": "x"}] * 11)
    names = [str(pack(tmp_path / "empty.tar", [])), str(shards / "0.tar"), str(broken), str(shards / "1.tar")]
    with pytest.raises(UserError, match=r"11 of 35 samples cannot be used.*broken\.tar:00000.*--bad-samples"):
        embed_shards(model, names, tmp_path / "i")
    done = embed_shards(model, names, tmp_path / "i", bad_samples=0.2)
    assert (done.images, done.kept, len(Index(tmp_path / "i"))) == (24, 3, 48)
    sample = next(iter_samples([str(shards / "1.tar")]))
    rows, scores = Index(tmp_path / "i").nearest(model.encode_image(sample.image).numpy(), 1)
    assert scores[0, 0] > 0.999
    assert 24 <= rows[0, 0] < 48


def test_processes_share_the_shards(model: mmssl.Model, shards: Path, index: Path, tmp_path: Path) -> None:
    """Two processes' parts, made one after the other, are those of one process."""
    names = expand([str(shards / "*.tar")])
    for rank in (0, 1):
        lone = World(rank, 2)
        object.__setattr__(lone, "barrier", lambda: None)
        assert embed_shards(model, names, tmp_path, world=lone).images == 24
    for path in (index / "parts").iterdir():
        assert (tmp_path / "parts" / path.name).read_bytes() == path.read_bytes()


def test_an_index_of_another_model_or_of_other_shards_is_refused(
    index: Path, model: mmssl.Model, shards: Path, tmp_path: Path
) -> None:
    """Neither mixed nor searched, even if one weight differs by its last bit; another device, number format or a saved
    copy is the same model."""
    names = expand([str(shards / "*.tar")])
    other = own()
    Index(index).check(other)
    with torch.no_grad():
        weight = next(other.encoder.image_projection.parameters())
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(2.0))
    with pytest.raises(UserError, match="another model or other weights"):
        embed_shards(other, names, index)
    with pytest.raises(UserError, match="another model or other weights"):
        Index(index).check(other)
    with pytest.raises(UserError, match="other shards"):
        embed_shards(model, [str(pack(tmp_path / "x.tar", []))], index)
    model.save(tmp_path / "saved")
    copy = mmssl.load(tmp_path / "saved")
    copy.precision = "bf16"
    stored = Index(index)
    stored.check(copy)
    with torch.no_grad():
        next(copy.encoder.image_projection.parameters()).mul_(2)
    with pytest.raises(UserError, match="other weights"):
        stored.check(copy)
    with pytest.raises(UserError, match="mmssl embed"):
        Index(tmp_path)


def test_an_index_follows_its_shards(model: mmssl.Model, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Embedding again gives what a first embedding of the shards as they are now gives: new ones are added, a rewritten
    and a damaged one are made anew, vanished ones are removed with their files and the graph; the rest is kept."""

    def squares(name: str, count: int, start: int) -> str:
        records = [{"png": paint(start + i), "txt": f"{name} {i}"} for i in range(count)]
        return str(pack(tmp_path / "shards" / f"{name}.tar", records))

    def content(folder: Path) -> list[tuple[str, str, bytes]]:
        index = Index(folder)
        hits = index.hits(range(len(index)), [0.0] * len(index))
        return [(h.shard, h.caption, index.embedding(row).tobytes()) for row, h in enumerate(hits)]

    old = [squares("a", 3, 0), squares("b", 4, 50), squares("c", 2, 90), squares("d", 2, 120)]
    out = tmp_path / "index"
    assert embed_shards(model, old, out).images == 11
    Index(out).build_graph()
    damaged = Index(out).record.parts[3]
    (out / "parts" / f"{damaged:06}.parquet").write_bytes(b"damaged")
    new = [squares("0", 2, 7), old[0], squares("b", 5, 200), old[3]]
    done = embed_shards(model, new, out)
    assert (done.images, done.kept, done.renewed, done.removed, done.had_graph) == (9, 1, 1, 1, True)
    embed_shards(model, new, tmp_path / "fresh")
    assert content(out) == content(tmp_path / "fresh")
    assert len(list((out / "parts").iterdir())) == 8
    assert not list(out.glob("graph*"))
    again = embed_shards(model, new, out)
    assert (again.images, again.kept, again.renewed, again.removed) == (0, 4, 0, 0)


def test_photographs_need_no_captions(model: mmssl.Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder of images without captions is embedded and searched; a broken image is named; images that are added,
    changed and removed later are followed."""
    photos, out = tmp_path / "photos" / "trip", tmp_path / "index"
    photos.mkdir(parents=True)
    for number in range(4):
        (photos / f"{number}.png").write_bytes(paint(number * 60))
    (photos / "1.txt").write_text("a caption")
    (photos / "broken.png").write_bytes(b"no image")
    model.save(tmp_path / "m")
    command = ["embed", str(tmp_path / "m"), str(tmp_path / "photos"), "--out", str(out)]
    assert "4 images" in ok(command, capsys)
    index = Index(out)
    hits = index.hits(range(4), [0.0] * 4)
    assert {(hit.key, hit.caption) for hit in hits} == {(f"trip/{n}", "a caption" if n == 1 else "") for n in range(4)}
    (photos / "broken.png").unlink()
    (photos / "0.png").unlink()
    (photos / "9.png").write_bytes(paint(999))
    ok(command, capsys)
    keys = [hit.key for hit in Index(out).hits(range(4), [0.0] * 4)]
    assert sorted(keys) == [f"trip/{n}" for n in (1, 2, 3, 9)]
    found = Index(out).nearest(model.encode_image(paint(999)).numpy(), 1)
    assert keys[found[0][0, 0]] == "trip/9"


def unit(rng: np.random.Generator, rows: int) -> npt.NDArray[np.float32]:
    x = rng.normal(size=(rows, 32))
    normed: npt.NDArray[np.float32] = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    return normed


@pytest.mark.parametrize("k", [1, 7, 500])
def test_exact_search_is_sorting(k: int) -> None:
    """Over parts of any size, the rows and products are those of sorting all products; k may exceed the rows."""
    rng = np.random.default_rng(0)
    stored, queries = unit(rng, 300).astype(np.float16), unit(rng, 5)
    rows, scores = exact_nearest(queries, [stored[:1], stored[1:200], stored[200:]], k)
    products = queries @ stored.astype(np.float32).T
    order = np.argsort(-products, axis=1)[:, :k]
    np.testing.assert_array_equal(rows, order)
    np.testing.assert_allclose(scores, np.take_along_axis(products, order, 1), atol=1e-5)


def test_the_graph_finds_nearly_all_neighbours(tmp_path: Path) -> None:
    """Of the 10 nearest among 5,000 random vectors, at least 99 %, in the order of their products; the file opens
    again, and with other vectors it is refused."""
    rng = np.random.default_rng(0)
    stored, queries = unit(rng, 5000).astype(np.float16), unit(rng, 40)
    parts = [stored[:2000], stored[2000:]]
    Graph.build(parts, 32, tmp_path / "g")
    rows, scores = Graph.open(tmp_path / "g", parts).nearest(queries, 10)
    truth, _ = exact_nearest(queries, [stored], 10)
    shared = sum(len(set(a) & set(b)) for a, b in zip(rows.tolist(), truth.tolist(), strict=True))
    assert shared / 400 > 0.99
    products = (queries[:, None] * stored[rows].astype(np.float32)).sum(-1)
    np.testing.assert_allclose(scores, products, atol=1e-6)
    assert (np.diff(scores) <= 0).all()
    with pytest.raises(UserError, match="graph of 5,000 embeddings, not of these 2,000"):
        Graph.open(tmp_path / "g", parts[:1])


def test_the_graph_finds_as_many_as_there_are(tmp_path: Path) -> None:
    """Among few vectors it finds each once, and among equal ones as many as are wanted."""
    stored, query = unit(np.random.default_rng(0), 5).astype(np.float16), unit(np.random.default_rng(1), 1)
    rows, _ = Graph.build([stored], 32, tmp_path / "few").nearest(query, 5)
    assert sorted(rows[0].tolist()) == [0, 1, 2, 3, 4]
    equal = np.repeat(stored[:1], 3000, axis=0)
    rows, scores = Graph.build([equal], 32, tmp_path / "equal").nearest(equal[:2], 10)
    assert [len(set(found)) for found in rows.tolist()] == [10, 10]
    np.testing.assert_allclose(scores, 1, atol=1e-3)


def test_embed_and_search_by_commands(
    model: mmssl.Model, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An image of the set is found as the nearest to itself, through the graph and exactly; words find something; the
    hits are drawn."""
    model.save(tmp_path / "m")
    ok(["embed", str(tmp_path / "m"), str(shards / "*.tar"), "--out", str(tmp_path / "i"), "--graph"], capsys)
    sample = list(iter_samples(expand([str(shards / "*.tar")])))[30]
    (tmp_path / "query.png").write_bytes(sample.image)
    common = ["search", str(tmp_path / "m"), str(tmp_path / "i")]
    for more in ([], ["--exact"]):
        printed = ok([*common, str(tmp_path / "query.png"), "-k", "3", *more], capsys)
        lines = [line for line in printed.splitlines() if "s0-" in line or "s1-" in line]
        assert len(lines) == 3
        own = next(line for line in lines if sample.key in line)
        # Squares of one colour are as near as float16 can tell.
        assert own.split("│")[1] == lines[0].split("│")[1]
    ok([*common, "a red square", "-k", "7", "--out", str(tmp_path / "hits.png")], capsys)
    with Image.open(tmp_path / "hits.png") as drawn:
        assert drawn.width > 500


def test_words_and_images_are_told_apart(model: mmssl.Model, tmp_path: Path) -> None:
    """A file is encoded as an image, other words as words, however long; a file that is missing or holds no image is
    named, not searched for as words."""
    path = tmp_path / "a cat.png"
    Image.new("RGB", (30, 20), "red").save(path)
    assert np.array_equal(encode_query(model, str(path)), model.encode_image(path).numpy())
    assert np.array_equal(encode_query(model, Image.open(path)), model.encode_image(path).numpy())
    long = "a red square " * 400
    for words in ("a red square", "node.js", long):
        assert np.array_equal(encode_query(model, words), model.encode_text(words).numpy())
    with pytest.raises(UserError, match=r"no image at .*a dog\.png; correct the path"):
        encode_query(model, str(tmp_path / "a dog.png"))
    with pytest.raises(UserError, match="empty"):
        encode_query(model, " ")
    path.write_text("no image")
    with pytest.raises(UserError, match=r"a cat\.png is not a usable image"):
        encode_query(model, str(path))


def test_captions_are_shown_as_they_are(model: mmssl.Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Captions and queries with marks of a table's, of a formula or of a script that the font lacks are printed, given
    as JSON and drawn, to whatever file is named."""
    captions = ["[/red] x[2]", "$a$ \\frac{ $", "\u4e00\u53ea\u732b", ""]
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for number, caption in enumerate(captions):
            image = io.BytesIO()
            Image.new("RGB", (24, 24), (60 * number, 9, 9)).save(image, "PNG")
            for extension, data in {"png": image.getvalue(), "txt": caption.encode()}.items():
                info = tarfile.TarInfo(f"{number}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    model.save(tmp_path / "m")
    embed_shards(model, [str(tmp_path / "0.tar")], tmp_path / "i")
    common = ["search", str(tmp_path / "m"), str(tmp_path / "i"), "$ [/red] \\frac{"]
    printed = ok([*common, "--out", str(tmp_path / "hits")], capsys)
    assert all(caption in printed for caption in captions)
    assert (tmp_path / "hits").read_bytes().startswith(b"\x89PNG")
    hits = json.loads(ok([*common, "--json", "-k", "2", "--out", str(tmp_path / "hits")], capsys))
    assert [set(hit) for hit in hits] == [{"similarity", "key", "caption", "shard", "fields"}] * 2
    assert hits[0]["caption"] in captions


def test_export_by_command(
    model: mmssl.Model, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """8-bit ONNX files are written, and their zero-shot accuracy is printed beside the model's."""
    model.save(tmp_path / "m")
    arguments = ["export", str(tmp_path / "m"), "--format", "onnx", "--out", str(tmp_path / "o"), "--int8"]
    (shards / "classnames.txt").write_text("red\ngreen\nblue\nwhite")
    printed = ok([*arguments, "--data", str(shards / "*.tar")], capsys)
    assert "8-bit weights" in printed
    assert "/zero_shot acc1: " in printed
    assert (tmp_path / "o" / "README.md").is_file()


def ok(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command prints that ends well."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert not caught.value.code
    return capsys.readouterr().out
