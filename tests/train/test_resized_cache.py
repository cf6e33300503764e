"""A run with a cache of resized images says so, and trains alike whether the cache is empty or filled."""

import json
from pathlib import Path

import pytest

from mmssl.config import load_config
from mmssl.errors import UserError
from mmssl.train.trainer import train

ROOT = Path(__file__).parents[2]


def losses(run: Path, *overrides: str) -> list[float]:
    words = [f"run_dir={run}", "train.steps=3", "evaluate.suites={}", *overrides]
    train(load_config(ROOT / "configs" / "ci_tiny.yaml", words))
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_losses_do_not_depend_on_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An empty and a filled cache give the same losses, unlike those of the originals; the log names it."""
    monkeypatch.chdir(ROOT)
    cached = [f"data.cache.dir={tmp_path / 'cache'}", "data.cache.resize=48"]
    cold = losses(tmp_path / "cold", *cached)
    assert f"images are shrunk to 48 px and kept in {tmp_path / 'cache'}" in " ".join(capsys.readouterr().err.split())
    assert list((tmp_path / "cache").glob("*/*"))
    assert losses(tmp_path / "warm", *cached) == cold
    assert losses(tmp_path / "originals") != cold


def test_images_are_not_shrunk_below_a_view(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the view and its size, before anything is kept."""
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=r"data\.cache\.resize=8 is less than the 32 px of the view 'main'"):
        losses(tmp_path / "run", f"data.cache.dir={tmp_path / 'cache'}", "data.cache.resize=8")
