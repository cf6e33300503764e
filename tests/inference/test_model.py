"""What a loaded model says about the texts it encodes."""

import logging
from pathlib import Path

import pytest

import mmssl

MODEL = Path(__file__).parents[1] / "golden" / "model"


@pytest.mark.parametrize(
    ("texts", "parts"),
    [
        (["a cat", "日本", "日 a", "x"], ["of 4 captions", "2 (50.0%) hold letters or words"]),
        (["a cat"] * 7 + ["a " * 90], ["of 8 captions", "1 (12.5%) are cut at 77 tokens"]),
        (["a " * 90, "日本"], ["1 (50.0%) are cut", "1 (50.0%) hold"]),
    ],
)
def test_lost_words_are_reported_once(texts: list[str], parts: list[str], caplog: pytest.LogCaptureFixture) -> None:
    """One warning gives the shares of captions that are cut or hold unknown tokens, over all batches of a call."""
    model = mmssl.load(MODEL)
    with caplog.at_level(logging.WARNING):
        model.encode_text(["a cat"] * 3)
        assert not caplog.messages
        model.encode_text(texts, batch_size=3)
        model.encode_text(texts)
    (message,) = caplog.messages
    assert all(part in message for part in parts)
