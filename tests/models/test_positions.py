"""Text towers whose learned positions are stretched for longer captions (Long-CLIP)."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import mmssl
from mmssl.build import build_encoder, complete_config
from mmssl.config import Config, TextConfig, parse_config
from mmssl.errors import UserError
from mmssl.models.positions import stretched
from mmssl.models.text import TextTower
from mmssl.models.text_factory import build_text
from mmssl.train.trainer import train
from tests.helpers.open_clip_folders import write_open_clip
from tests.helpers.tiny_runs import run_tree, write_pairs
from tests.helpers.tower_types import text_config


def test_stretching_four_times_is_long_clips_loop() -> None:
    """77 positions become 248 as in Long-CLIP's own loop: 20 stay, each later one is followed by three interpolated
    ones, and the last four continue the line through the last two."""
    table, kept = torch.randn(77, 8, generator=torch.Generator().manual_seed(0)), 20
    expected = torch.zeros(4 * 77 - 3 * kept, 8)
    for i in range(kept):
        expected[i] = table[i]
    for i in range(77 - 1 - kept):
        for j in range(4):
            expected[kept + 4 * i + j] = (4 - j) * table[kept + i] / 4 + j * table[kept + i + 1] / 4
    for j in range(4):
        expected[4 * 77 - 3 * kept - 4 + j] = table[76] + j * (table[76] - table[75]) / 4
    assert len(expected) == 248
    torch.testing.assert_close(stretched(table, 248), expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(stretched(table, 248)[: kept + 1], table[: kept + 1])


@given(st.integers(3, 90), st.integers(1, 200))
def test_stretching_to_any_length_is_interpolation(old: int, more: int) -> None:
    """As numpy interpolates each dimension at equal steps behind the kept positions, and a straight line beyond."""
    table = torch.randn(old, 3, generator=torch.Generator().manual_seed(old))
    length, kept = old + more, min(20, old - 2)
    places = np.concatenate([np.arange(kept), kept + np.arange(length - kept) * (old - kept) / (length - kept)])
    expected = np.stack([np.interp(places, np.arange(old), column) for column in table.double().numpy().T], axis=1)
    beyond = places > old - 1
    slope = (table[-1] - table[-2]).double().numpy()
    expected[beyond] = table[-1].double().numpy() + (places[beyond, None] - (old - 1)) * slope
    found = stretched(table, length)
    assert found.shape == (length, 3)
    np.testing.assert_allclose(found.double().numpy(), expected, atol=1e-5)


def captions(lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    tokens = torch.randint(5, 290, mask.shape, generator=torch.Generator().manual_seed(1))
    return tokens.masked_fill(~mask, 0), mask


LEARNED = [
    "bert",
    "roberta",
    "xlm-roberta",
    "mpnet",
    "distilbert",
    "electra",
    "albert",
    "bart",
    "gpt2",
    "clip_text_model",
    "metaclip_2_text_model",
    "blip_text_model",
]


@pytest.mark.parametrize("kind", LEARNED)
def test_short_captions_keep_their_vectors_and_long_ones_fit(kind: str) -> None:
    """Of a tower of 77 (BART: 80) positions stretched to 120: captions of up to 20 tokens have the same vectors;
    captions of 120 tokens are read, and every position gets a gradient; and the tower that its configuration builds
    takes its weights and gives the same."""
    torch.manual_seed(0)
    tower = build_text(text_config(kind, "mean"), vocab_size=300, pad_id=0).eval()
    short, mask = captions((20, 7, 13))
    with torch.no_grad():
        before = tower(short, mask).pooled
    tower.stretch(120)
    assert (tower.stretched_from, tower.positions) == (80 if kind == "bart" else 77, 120)
    with torch.no_grad():
        torch.testing.assert_close(tower(short, mask).pooled, before, atol=1e-6, rtol=1e-5)
    long, mask = captions((120, 120))
    tower(long, mask).tokens.square().sum().backward()
    gradients = [p.grad for n, p in tower.named_parameters() if p.shape[0] in (120, 121, 122) and p.grad is not None]
    assert len(gradients) == 1
    assert int((gradients[0].abs().sum(1) > 0).sum()) == 120
    again = build_text(tower.to_config("train", 120), vocab_size=300, pad_id=0).eval()
    again.load_state_dict(tower.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(again(long, mask).pooled, tower(long, mask).pooled)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("siglip_text_model", "reads captions padded"),
        ("modernbert", "no table"),
        ("llama", "no table"),
    ],
)
def test_towers_without_learned_positions_are_refused_as_before(kind: str, said: str) -> None:
    """Rotary positions need no stretching, and towers that read padding would give other vectors: nothing changes."""
    torch.manual_seed(0)
    tower = build_text(text_config(kind), vocab_size=300, pad_id=0).eval()
    weights = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    had = tower.positions
    assert had is not None
    problem = f"model.text.max_tokens={had + 40}, but the tower has {had} positions"
    with pytest.raises(UserError, match=f"{problem}.*{said}"):
        tower.stretch(had + 40)
    assert tower.positions == had
    assert all(torch.equal(tensor, weights[name]) for name, tensor in tower.state_dict().items())


def test_a_pretrained_folder_is_stretched_and_one_with_random_weights_refused(tmp_path: Path) -> None:
    """`model.text.max_tokens` beyond the positions of a folder stretches them."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = transformers.BertConfig(**sizes, vocab_size=300, max_position_embeddings=48)
    transformers.BertModel(config).save_pretrained(tmp_path)
    plain, longer = (
        build_text(TextConfig(name=str(tmp_path), pooling="mean", max_tokens=n), 300, 0).eval() for n in (48, 90)
    )
    assert (plain.stretched_from, longer.stretched_from) == (None, 48)
    tokens, mask = captions((20, 11))
    with torch.no_grad():
        torch.testing.assert_close(longer(tokens, mask).pooled, plain(tokens, mask).pooled, atol=1e-6, rtol=1e-5)
    with pytest.raises(UserError, match="max_tokens=90, but the tower has 48 positions; lower"):
        build_text(TextConfig(config=plain.to_config("train", 48).config, tokenizer="train", max_tokens=90), 300, 0)


def started(shards: Path, run: Path, folder: Path, **changes: Any) -> Config:
    tree = run_tree(shards, run, **{"train__steps": 2, "train__ema": None, "evaluate": {}, **changes})
    tree["model"] = {"start": f"local-dir:{folder}", "text": {"max_tokens": 120}}
    return parse_config(tree, "test")


def test_a_run_from_a_clip_model_reads_longer_captions(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, capfd: pytest.CaptureFixture[str]
) -> None:
    """`model.start` with `model.text.max_tokens=120`: short captions keep open_clip's embeddings and long ones are not
    cut; the run says so, trains, resumes, and its model loads with 120 positions."""
    write_open_clip(tmp_path / "clip", "vit")
    source = mmssl.load(f"local-dir:{tmp_path / 'clip'}")
    shards = write_pairs(tmp_path_factory.mktemp("shards"))
    config = started(shards, tmp_path / "run", tmp_path / "clip")
    completed, _ = complete_config(config)
    assert completed.model.text.config is not None
    assert completed.model.text.config["context_length"] == 120
    encoder = build_encoder(completed, source.tokenizer).eval()
    tokens, mask = source.tokenizer.encode(["a photo of a cat", "two dogs on a beach"])
    with torch.no_grad():
        torch.testing.assert_close(encoder.encode_text(tokens, mask), source.encoder.encode_text(tokens, mask))
    train(config)
    assert "model.text.max_tokens=120: the 77 positions of the text tower are stretched" in capfd.readouterr().err
    train(started(shards, tmp_path / "run", tmp_path / "clip", train__steps=3), resume=True)
    model = mmssl.load(tmp_path / "run")
    assert (model.text.positions, model.tokenizer.max_tokens) == (120, 120)
    words = "one two three four five six seven eight nine ten " * 10
    first, second = model.encode_text([f"{words} cat", f"{words} dog"])
    assert not torch.allclose(first, second)
    assert isinstance(model.text, TextTower)
