"""Evaluation, search and export with the first dimensions of the embeddings."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mmssl.apps.export import export
from mmssl.apps.search import Index, embed_shards, encode_query
from mmssl.cli.evaluate import _parse_dims
from mmssl.errors import UserError
from mmssl.evaluate import suite
from mmssl.inference import Model
from tests.helpers.export_models import own
from tests.helpers.tiny_runs import write_pairs
from tests.helpers.toy_encoder import ToyEncoder, pack, paint


class Shortened(ToyEncoder):
    """The toy encoder cut to its first dimensions by itself."""

    def __init__(self, dim: int) -> None:
        super().__init__(noise=2.0)
        self.dim = dim

    def encode_image(self, images: list[bytes]) -> Tensor:
        return F.normalize(super().encode_image(images)[:, : self.dim], dim=-1)

    def encode_text(self, texts: list[str]) -> Tensor:
        return F.normalize(super().encode_text(texts)[:, : self.dim], dim=-1)


def test_dims_give_the_metrics_of_shortened_encoders(tmp_path: Path) -> None:
    """Each number of dimensions has the metrics of an encoder that computes only these, for classes, retrieval and a
    linear probe, while every image and text is encoded once."""
    for split in ("train", "test"):
        first = 10 * (split == "test")
        records = [{"png": paint(i % 5, first + i // 5), "cls": i % 5, "txt": f"n {i % 5}"} for i in range(40)]
        pack(tmp_path / f"{split}-0.tar", records)
    (tmp_path / "classnames.txt").write_text("".join(f"number {i}\n" for i in range(5)))
    plan = {"d": (tmp_path, ["zero_shot", "linear_probe", "retrieval"])}
    encoder = ToyEncoder(noise=2.0)
    found = suite.run(encoder, plan, tmp_path / "out", suite.SuiteOptions(dims=(64, 16, 4), draw=False))
    assert sum(encoder.calls) == 80
    assert [*found][:3] == ["d/zero_shot@64", "d/zero_shot@16", "d/zero_shot@4"]
    for dim in (64, 16, 4):
        expected = suite.run(Shortened(dim), plan)
        for key, metrics in expected.items():
            _assert_alike(found[f"{key}@{dim}"], metrics)
    assert found["d/zero_shot@4"]["acc1"] < found["d/zero_shot@64"]["acc1"]
    assert (tmp_path / "out" / "d" / "zero_shot@16" / "predictions.csv").is_file()
    with pytest.raises(UserError, match="--dims 65: .* have 64 dimensions"):
        suite.run(encoder, plan, options=suite.SuiteOptions(dims=(65,)))


def _assert_alike(found: Any, expected: Any) -> None:
    """Equal but for rounding, at any depth."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            _assert_alike(found[key], value)
    elif isinstance(expected, (int, float, list)):
        assert found == pytest.approx(expected, abs=1e-6)
    else:
        assert found == expected


def test_words_of_dims() -> None:
    """`512, 256` are numbers; anything else is refused with an example."""
    assert _parse_dims("512, 256,512") == (512, 256)
    assert _parse_dims(None) == ()
    with pytest.raises(UserError, match="512,256,128"):
        _parse_dims("512;256")


@pytest.fixture(scope="module")
def model() -> Model:
    """Random towers whose embeddings have 16 dimensions."""
    return own()


def test_a_cut_model_has_the_first_dimensions(model: Model, tmp_path: Path) -> None:
    """Embeddings of a cut model are the first dimensions of the whole one, normalised; an index made with them is
    searched with them by the whole model, and an export computes them."""
    dim = model.config.embed_dim // 2
    cut, texts = model.first_dimensions(dim), ["a red square", "green"]
    images = torch.randint(0, 256, (3, 3, model.vision.image_size, model.vision.image_size), dtype=torch.uint8)
    for whole, short in (
        (model.encode_text(texts), cut.encode_text(texts)),
        (model.encode_rendered(images), cut.encode_rendered(images)),
    ):
        torch.testing.assert_close(short, F.normalize(whole[:, :dim], dim=1), rtol=1e-5, atol=1e-6)
    assert cut.fingerprint() != model.fingerprint()
    assert model.first_dimensions(model.config.embed_dim) is model
    shards = sorted(map(str, write_pairs(tmp_path).glob("*.tar")))
    embed_shards(cut, shards, tmp_path / "index")
    index = Index(tmp_path / "index")
    query = encode_query(index.fit(model), "a red square")
    rows, similarities = index.nearest(query, 5)
    every = np.concatenate(index.parts).astype(np.float32)
    assert every.shape == (48, dim)
    np.testing.assert_allclose(similarities[0], np.sort(every @ query[0])[::-1][:5], rtol=1e-3)
    assert len(rows[0]) == 5
    done = export(cut, "sentence_transformers", tmp_path / "export")
    assert done.difference < 1e-5
    with pytest.raises(UserError, match=f"have {model.config.embed_dim} dimensions"):
        model.first_dimensions(0)
