"""The measurement of embedding gives both sides the same pictures and the same model."""

from pathlib import Path

import pytest
import torch

from mmssl import Model
from mmssl.bench.embed import EmbedBench, bench_embed
from mmssl.data.tokens import train_tokenizer
from mmssl.evaluate.datasets import open_dataset
from mmssl.models.dual_encoder import build_dual_encoder
from mmssl.types import UserError
from tests.conftest import tiny_model_config
from tests.pairs import write_pairs

pytest.importorskip("clip_benchmark")


def test_both_sides_embed_the_same_pictures(tmp_path: Path) -> None:
    """Every picture is embedded by both in every round, to nearly the same features."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["a red square"], 64, 77)
    model = Model(build_dual_encoder(tiny_model_config(), tokenizer.vocab_size, tokenizer.pad_id), tokenizer,
                  tiny_model_config())  # fmt: skip
    dataset = open_dataset(str(write_pairs(tmp_path) / "*.tar"))
    found = bench_embed(model, dataset, batch_size=10, workers=1, rounds=2)
    assert found.pictures == 48
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
