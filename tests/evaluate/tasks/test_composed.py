"""Searches by an image and a text, against loops and against the two searches alone."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import mmssl
from mmssl.apps.search import Index, embed_shards, encode_query
from mmssl.errors import UserError
from mmssl.evaluate import suite
from mmssl.evaluate.metrics import composed
from mmssl.evaluate.tasks.composed import Query, read_queries, rows_by_key
from mmssl.types import Sample
from tests.cli.test_main import main_ok
from tests.helpers.export_models import own
from tests.helpers.toy_encoder import ToyEncoder, pack, paint

OPTIONS = suite.SuiteOptions(draw=False)


def gallery(folder: Path, queries: Any, count: int = 80) -> Path:
    """Images of the numbers from 300 on, and queries."""
    pack(folder / "test" / "0.tar", [{"png": paint(300 + n, n)} for n in range(count)])
    (folder / "queries.json").write_text(json.dumps(queries))
    return folder


def queries(count: int = 40) -> list[dict[str, str]]:
    """From each image by a text to the one two places further."""
    return [
        {"reference": f"{n:05d}", "target": f"{n + 2:05d}", "txt": f"more like thing {302 + n}"} for n in range(count)
    ]


def evaluate(folder: Path, out: Path | None = None, noise: float = 2.5) -> dict[str, Any]:
    (found,) = suite.run(ToyEncoder(noise=noise), {"c": (folder, "composed")}, out, OPTIONS).values()
    return found


def test_recalls_are_those_of_a_loop(tmp_path: Path) -> None:
    """The sum of both unit vectors searches among all images but the reference; so do the image and the text alone."""
    folder = gallery(tmp_path / "data", queries())
    found = evaluate(folder, tmp_path / "out")
    encoder = ToyEncoder(noise=2.5)
    images = encoder.encode_image([paint(300 + n, n) for n in range(80)])
    ranks: dict[str, list[int]] = {"": [], "_image": [], "_text": []}
    for n in range(40):
        text = encoder.encode_text([f"more like thing {302 + n}"])[0]
        for name, query in (("", images[n] + text), ("_image", images[n]), ("_text", text)):
            scores = [(float(query @ images[row]), row) for row in range(80) if row != n]
            ranks[name].append([row for _, row in sorted(scores, reverse=True)].index(n + 2) + 1)
    for name, values in ranks.items():
        for k in (1, 5, 10, 50):
            assert found[f"recall@{k}{name}"] == pytest.approx(np.mean([rank <= k for rank in values])), (k, name)
    assert 0.1 < found["recall@1"] < 1
    assert found["recall@10_image"] < found["recall@10"]
    assert found["baselines"]["recall@10"]["chance"] == pytest.approx(10 / 79)
    assert (found["queries"], found["images"]) == (40, 80)
    with (tmp_path / "out" / "c" / "composed" / "ranks.csv").open() as file:
        assert [int(row["rank@0.5"]) for row in csv.DictReader(file)] == ranks[""]
    with (tmp_path / "out" / "c" / "composed" / "weights.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["text_weight"] for row in rows] == ["0.0", "0.25", "0.5", "0.75", "1.0"]
    assert float(rows[0]["recall@5"]) == pytest.approx(found["recall@5_image"])


def test_equal_images_count_as_better() -> None:
    """A target among copies of itself gets the last of their ranks, so that a constant model finds nothing."""
    constant = F.normalize(torch.ones(6, 4), dim=-1)
    ranks = composed.target_ranks(constant[:2], constant, torch.tensor([3, 4]), torch.tensor([0, 1]))
    assert ranks.tolist() == [5, 5]


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ({"reference": "a", "target": "b", "txt": "in red"}, "in red"),
        ({"pairid": 1, "reference": "a", "target_hard": "b", "target_soft": {"b": 1.0}, "caption": "in red"}, "in red"),
        ({"candidate": "a", "target": "b", "captions": ["is red", "is longer"]}, "is red and is longer"),
    ],
)
def test_queries_of_the_benchmarks_are_read(entry: dict[str, Any], text: str, tmp_path: Path) -> None:
    """Our form, CIRR's and FashionIQ's."""
    (tmp_path / "q.json").write_text(json.dumps([entry]))
    assert read_queries(tmp_path / "q.json") == [Query("a", "b", text)]


def test_keys_may_lack_their_folder() -> None:
    """The last part of a key names a sample where only one has it."""
    samples = [Sample(n, "s", key, b"", {}) for n, key in enumerate(["x/a", "y/b", "z/b"])]
    assert rows_by_key(samples) == {"x/a": 0, "y/b": 1, "z/b": 2, "a": 0}


def test_what_cannot_be_searched_is_named(tmp_path: Path) -> None:
    """No queries, none that fits, malformed ones; those without their images are counted."""
    missing = gallery(tmp_path / "m", [])
    (missing / "queries.json").unlink()
    cases: list[tuple[Path, str]] = [
        (missing, "needs queries; write queries.json"),
        (gallery(tmp_path / "e", []), "must be a list of queries, found nothing"),
        (gallery(tmp_path / "o", {"a": 1}), "must be a list of queries, found something else"),
        (gallery(tmp_path / "w", [{"reference": "00001", "target": "x", "txt": "red"}]), "'00001' and 'x'"),
        (gallery(tmp_path / "t", [{"reference": "00001", "target": "00002"}]), "query 1 .* has no txt or caption"),
        (gallery(tmp_path / "n", ["red"]), "query 1 .* is no object"),
    ]
    for folder, words in cases:
        with pytest.raises(UserError, match=words):
            evaluate(folder)
    extra = [*queries(3), {"reference": "00001", "target": "gone", "txt": "red"}]
    assert evaluate(gallery(tmp_path / "x", extra))["queries_without_image"] == 1


def test_an_index_is_searched_by_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`mmssl search IMAGE --text`, Python and the sum of both embeddings give the same hits; a weight of 0 or 1 gives
    those of the image or of the text."""
    model = own()
    model.save(tmp_path / "model")
    shard = pack(tmp_path / "0.tar", [{"png": paint(257 * n * 7), "txt": f"thing {n}"} for n in range(30)])
    embed_shards(model, [str(shard)], tmp_path / "index")
    (tmp_path / "q.png").write_bytes(paint(4000))
    image, text = model.encode_image(tmp_path / "q.png"), model.encode_text("a red square")
    index = Index(tmp_path / "index")
    rows, _ = index.nearest(F.normalize(image + text, dim=-1).numpy(), 5)
    expected = [f"{row:05d}" for row in rows[0].tolist()]
    command = ["search", str(tmp_path / "model"), str(tmp_path / "index"), str(tmp_path / "q.png"), "--json", "-k", "5"]
    command += ["--precision", "fp32"]
    capsys.readouterr()
    main_ok([*command, "--text", "a red square"])
    assert [hit["key"] for hit in json.loads(capsys.readouterr().out)] == expected
    hits = mmssl.MMSSL(tmp_path / "model").search(tmp_path / "q.png", index, count=5, text="a red square")
    assert [hit.key for hit in hits] == expected
    for weight, alone in ((0.0, image), (1.0, text)):
        query = encode_query(model, str(tmp_path / "q.png"), "a red square", weight)
        np.testing.assert_allclose(query, alone.numpy(), atol=1e-6)
    with pytest.raises(UserError, match="weight of the text is 2"):
        encode_query(model, "a", "b", 2)
    with pytest.raises(UserError, match="the query is empty"):
        encode_query(model, str(tmp_path / "q.png"), " ")
