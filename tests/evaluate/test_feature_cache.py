"""Features are kept between evaluations, and found again only where nothing changed."""

import os
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from mmssl.data.shards import BadSample
from mmssl.errors import UserError
from mmssl.evaluate import suite
from mmssl.evaluate.encode import EncodedImages
from mmssl.evaluate.feature_cache import FeatureCache, default_folder
from mmssl.files import read_csv
from mmssl.types import PipeCommand, Sample
from tests.helpers.evaluation_ranks import on_ranks
from tests.helpers.toy_encoder import ToyEncoder, pack, paint


def test_a_second_evaluation_encodes_nothing(numbers: Path, tmp_path: Path) -> None:
    """The same model on the same shards has the same figures without encoding an image; bad ones are still counted."""
    pack(numbers / "test" / "1.tar", [{"png": paint(100, 1), "cls": 0}, {"png": b"broken", "cls": 0}])
    cache = FeatureCache(tmp_path / "cache", "model a")
    data = {"n": (numbers, ["zero_shot"])}
    first, second = ToyEncoder(noise=2.0), ToyEncoder(noise=2.0)
    expected = suite.run(ToyEncoder(noise=2.0), data)
    assert suite.run(first, data, options=suite.SuiteOptions(cache=cache)) == expected
    assert suite.run(second, data, options=suite.SuiteOptions(cache=cache)) == expected
    assert expected["n/zero_shot"]["bad_samples"] == 1
    assert sum(first.calls) >= 26
    assert second.calls == []


def test_other_weights_and_changed_shards_are_encoded(numbers: Path, tmp_path: Path) -> None:
    """Another model, a rewritten shard, and a touched one are each encoded anew."""
    data = {"n": (numbers, "zero_shot")}

    def images(model: str) -> int:
        encoder = ToyEncoder()
        suite.run(encoder, data, options=suite.SuiteOptions(cache=FeatureCache(tmp_path / "cache", model)))
        return sum(encoder.calls)

    assert [images("a"), images("a"), images("b")] == [40, 0, 40]
    pack(numbers / "test" / "1.tar", [{"png": paint(101, 1), "cls": 1}])
    assert [images("a"), images("a")] == [26, 0]
    shard = numbers / "test" / "0.tar"
    os.utime(shard, ns=(0, shard.stat().st_mtime_ns + 1))
    assert [images("a"), images("a")] == [26, 0]


def test_an_interrupted_evaluation_goes_on(numbers: Path, captioned: Path, tmp_path: Path) -> None:
    """Datasets that were encoded before the interruption are not encoded again."""

    class Interrupted(ToyEncoder):
        def encode_text(self, texts: object) -> torch.Tensor:
            raise KeyboardInterrupt

    data = {"n": (numbers, "zero_shot"), "c": (captioned, "retrieval")}
    cache = FeatureCache(tmp_path / "cache", "a")
    with pytest.raises(KeyboardInterrupt):
        suite.run(Interrupted(), data, options=suite.SuiteOptions(cache=cache))
    encoder = ToyEncoder()
    assert suite.run(encoder, data, options=suite.SuiteOptions(cache=cache)) == suite.run(ToyEncoder(), data)
    assert sum(encoder.calls) == 30


def test_ranks_share_kept_features(numbers: Path, tmp_path: Path) -> None:
    """Two processes keep one copy, which both find; where only one finds it, both encode."""
    cache, data = FeatureCache(tmp_path / "cache", "a"), {"n": (numbers, "zero_shot")}
    expected = suite.run(ToyEncoder(), data, options=suite.SuiteOptions(batch_size=8))

    def encoded(cache: FeatureCache) -> list[int]:
        outcomes = on_ranks(2, ToyEncoder, data, batch_size=8, cache=cache)
        assert [results for results, _ in outcomes] == [expected] * 2
        return [sum(encoder.calls) for _, encoder in outcomes]

    assert [encoded(cache), encoded(cache)] == [[24, 16], [0, 0]]

    class OneSided(FeatureCache):
        def load(self, key: str, shards: Sequence[str]) -> EncodedImages | None:
            return super().load(key, shards) if threading.current_thread().name == "rank 0" else None

    assert encoded(OneSided(cache.folder, "a")) == [24, 16]


def test_labels_are_checked_although_nothing_is_read(numbers: Path, tmp_path: Path) -> None:
    """What a task needs of a sample is asked of kept samples too."""
    cache = FeatureCache(tmp_path / "cache", "a")
    suite.run(ToyEncoder(), {"n": (numbers, "zero_shot")}, options=suite.SuiteOptions(cache=cache))
    with pytest.raises(UserError, match="has no caption"):
        suite.run(ToyEncoder(), {"n": (numbers, "retrieval")}, options=suite.SuiteOptions(cache=cache))


def test_what_is_stored_comes_back(tmp_path: Path) -> None:
    """Features keep every bit, records every field; no other file stays in the folder."""
    samples = [Sample(3, "a.tar", "k", b"", {"cls": 1, "txt": "ünï", "tags": ["x"], "none": None})]
    images = EncodedImages(torch.tensor([[0.1, -0.2]]), samples, [BadSample("a.tar", "z", "broken")])
    cache = FeatureCache(tmp_path / "cache", "a")
    assert cache.load("key", ["a.tar"]) is None
    cache.store("key", ["a.tar"], images)
    found = cache.load("key", ["a.tar"])
    assert found is not None
    assert torch.equal(found.features, images.features)
    assert (found.samples, found.bad) == (images.samples, images.bad)
    assert sorted(path.name for path in cache.folder.iterdir()) == ["key.json", "key.safetensors"]


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_damaged_files_are_no_features(tmp_path: Path, suffix: str) -> None:
    """A cut or missing file is a miss, not an error, and is replaced."""
    cache = FeatureCache(tmp_path, "a")
    images = EncodedImages(torch.ones(2, 3), [Sample(i, "a.tar", str(i), b"", {}) for i in range(2)], [])
    cache.store("key", ["a.tar"], images)
    path = tmp_path / f"key.{suffix}"
    whole = path.read_bytes()
    for damaged in (whole[:-3], b"[]", b'{"samples": [{"shard": 7}]}'):
        path.write_bytes(damaged)
        assert cache.load("key", ["a.tar"]) is None
    path.unlink()
    assert cache.load("key", ["a.tar"]) is None
    cache.store("key", ["a.tar"], images)
    assert cache.load("key", ["a.tar"]) is not None


def test_shards_are_named_as_they_are_named_now(numbers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features kept from another folder, where the shards were named by another path, name them by the new one."""
    cache = FeatureCache(tmp_path / "cache", "a")
    monkeypatch.chdir(numbers.parent)
    suite.run(ToyEncoder(), {"n": ("numbers", "zero_shot")}, options=suite.SuiteOptions(cache=cache))
    monkeypatch.chdir("/")
    encoder = ToyEncoder()
    suite.run(encoder, {"n": (numbers, "zero_shot")}, tmp_path / "out", suite.SuiteOptions(draw=False, cache=cache))
    assert encoder.calls == []
    named = {row["shard"] for row in read_csv(tmp_path / "out" / "n" / "zero_shot" / "predictions.csv")}
    assert named == {str(numbers / "test" / f"{n}.tar") for n in (0, 1)}


def test_another_version_of_a_library_encodes_again(numbers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What renders and encodes may have changed with it."""
    cache, shards = FeatureCache(numbers, "a"), [str(numbers / "test" / "0.tar")]
    before = cache.key(shards)
    assert cache.key(shards) == before
    monkeypatch.setattr("mmssl.evaluate.feature_cache.version", lambda library: "another")
    assert cache.key(shards) != before


def test_places_that_cannot_hold_features(tmp_path: Path) -> None:
    """Commands have no time of change, so nothing is kept of them; an unwritable folder is named with the remedy."""
    assert FeatureCache(tmp_path, "a").key([PipeCommand("pipe:cat x.tar")]) is None
    (tmp_path / "file").touch()
    images = EncodedImages(torch.ones(1, 1), [Sample(0, "a.tar", "0", b"", {})], [])
    with pytest.raises(UserError, match="file.* give another --cache, or"):
        FeatureCache(tmp_path / "file" / "below", "a").store("key", ["a.tar"], images)


def test_the_default_folder_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """XDG_CACHE_HOME names the place; without it, ~/.cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "mmssl" / "features"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder() == tmp_path / ".cache" / "mmssl" / "features"
