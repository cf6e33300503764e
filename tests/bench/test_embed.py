"""The measurement of embedding gives both sides the same images and the same model."""

from pathlib import Path

import pytest
import torch

from mmssl import Model
from mmssl.data.transforms import train_tokenizer
from mmssl.errors import UserError
from mmssl.evaluate.datasets import open_dataset
from mmssl.models import build_dual_encoder
from scripts.bench.embed import EmbedBench, bench_embed
from scripts.bench.embed_tower import TowerBench, bench_tower
from tests.helpers.models import tiny_model_config
from tests.helpers.tiny_runs import write_pairs

pytest.importorskip("clip_benchmark")


def tiny_model() -> Model:
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["a red square"], 64, 77)
    encoder = build_dual_encoder(tiny_model_config(), tokenizer.vocab_size, tokenizer.pad_id)
    return Model(encoder, tokenizer, tiny_model_config())


def test_both_sides_embed_the_same_images(tmp_path: Path) -> None:
    """Every image is embedded by both in every round, to nearly the same features."""
    dataset = open_dataset(str(write_pairs(tmp_path) / "*.tar"))
    found = bench_embed(tiny_model(), dataset, batch_size=10, workers=1, rounds=2)
    assert found.images == 48
    assert len(found.ours) == len(found.theirs) == 2
    assert found.likeness == pytest.approx(1, abs=1e-3)
    assert "ratio" in found.text()


def test_the_ratio_is_of_throughputs() -> None:
    """Half the seconds are a ratio of 2; the table shows the medians."""
    found = EmbedBench(100, [1.0, 2.0, 1.0], [2.0, 2.0, 3.0], 1.0)
    assert found.ratios == [2.0, 1.0, 3.0]
    assert "ratio 2.00 [1.00, 3.00] over 3 rounds" in found.text()
    assert "100.0     1.00" in found.text()


def test_remote_shards_are_refused(tmp_path: Path) -> None:
    """clip_benchmark is given files, so remote shards are named."""
    dataset = open_dataset("https://example.org/0.tar")
    with pytest.raises(UserError, match=r"copy https://example.org/0\.tar"):
        bench_embed(None, dataset, batch_size=1, workers=1, rounds=1)  # type: ignore[arg-type]


def test_the_tower_sees_as_many_images_as_are_embedded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embedding and the tower alone encode the same number of images in every round, also where only a part of them
    is kept rendered."""
    monkeypatch.setattr("scripts.bench.embed_tower.READY_BATCHES", 2)
    model = tiny_model()
    encoded: list[int] = []
    encode = model.encode_rendered
    monkeypatch.setattr(model, "encode_rendered", lambda batch: encoded.append(len(batch)) or encode(batch))
    found = bench_tower(model, open_dataset(str(write_pairs(tmp_path) / "*.tar")).shards, batch_size=10, rounds=2)
    assert found.images == 48
    embedding, alone = [10, 10, 4, 10, 10, 4], [10, 10, 10, 10, 8]
    assert encoded == [*embedding, 10, *[*embedding, *alone] * 2]
    assert len(found.embed) == len(found.tower) == 2


def test_the_tower_ratio_is_what_is_left_of_its_speed() -> None:
    """Half as fast as the tower is 0.5."""
    found = TowerBench(100, 10, 2, [2.0, 4.0, 2.0], [1.0, 1.0, 1.5])
    assert found.ratios == [0.5, 0.25, 0.75]
    assert "ratio 0.500 [0.250, 0.750] over 3 rounds" in found.text()
