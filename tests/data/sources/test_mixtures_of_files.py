"""Folders that hold more than one kind of data: nothing is taken alone in silence, no held-out split is trained on."""

import logging
from pathlib import Path

import pytest

from mmssl.apps.autoconfig.preparation import is_shards, prepare
from mmssl.data import expand, resolve_sources
from mmssl.data.sources import iter_captions
from mmssl.data.sources.patterns import set_apart
from mmssl.errors import UserError
from tests.helpers.images import encode, photo
from tests.helpers.tars import pair, tar_bytes


def shard(path: Path, count: int = 8) -> str:
    """A shard of pairs whose keys carry its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = encode(photo(24, 24), "JPEG")
    files = [f for i in range(count) for f in ((f"{path.stem}-{i}.jpg", image), (f"{path.stem}-{i}.txt", b"a fox"))]
    path.write_bytes(tar_bytes(files))
    return str(path)


@pytest.mark.parametrize("take", [lambda data: expand(data), lambda data: resolve_sources(data), is_shards])
def test_images_beside_shards_are_refused_with_both_ways_out(tmp_path: Path, take: object) -> None:
    """A folder of pairs with a tar among them names what to type for the tar and what for the images."""
    (tmp_path / "a.jpg").write_bytes(b"x")
    (tmp_path / "a.txt").write_text("a fox")
    shard(tmp_path / "backup.tar")
    assert callable(take)
    with pytest.raises(UserError, match=r"1 \.tar file; for the shards give '.*/\*\.tar', for the images pack them"):
        take(str(tmp_path))
    assert expand(f"{tmp_path}/*.tar") == [f"{tmp_path}/backup.tar"]


@pytest.mark.parametrize(
    "other", ["val-00000", "valid_0", "validation-1", "test-00", "Held-Out-0", "holdout.3", "dev-1"]
)
@pytest.mark.parametrize("pattern", ["{}", "{}/*.tar", "{}/**/*.tar"])
def test_another_split_is_not_trained_on(
    tmp_path: Path, other: str, pattern: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Shards of another split beside train-*.tar are set apart and named, in a configuration and by --data."""
    train = [shard(tmp_path / f"train-{i:05}.tar", 20) for i in range(2)]
    held_out = shard(tmp_path / f"{other}.tar", 6)
    given = pattern.format(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert resolve_sources(given)[0].shards == train
    assert held_out in caplog.text
    found = prepare(given, tmp_path / "packed")
    assert (found.train, found.held_out) == (train, held_out)
    assert (found.pairs, found.held_out_pairs) == (40, 6)
    assert held_out in found.why


@pytest.mark.parametrize(
    ("names", "patterns"),
    [
        (["d/train-0.tar", "d/val-0.tar"], ["d/train-*.tar", "d/val-*.tar"]),
        (["d/train-0.tar", "d/val-0.tar"], ["d/{train,val}-*.tar"]),
        (["d/train-0.tar", "d/val-0.tar"], ["d/train-0.tar", "d/val-0.tar"]),
        (["d/val-0.tar", "d/val-1.tar"], ["d"]),
        (["d/test_images.tar", "d/photos.tar"], ["d"]),
        (["d/training-0.tar", "d/values.tar", "d/testament.tar", "d/devices.tar"], ["d"]),
        (["a/train-0.tar", "b/val-0.tar"], ["*/*.tar"]),
    ],
)
def test_splits_that_are_named_and_other_names_are_kept(names: list[str], patterns: list[str]) -> None:
    """What a pattern names itself, a split without train-*.tar, and names that only begin alike are trained on."""
    assert set_apart(names, patterns) == (names, [])


def test_samples_without_a_field_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Captions come from the samples that have the field; the others are one line with number, example and remedy."""
    files = [f for i in range(6) for f in pair(f"{i}")]
    files += [f for i in range(6, 10) for f in ((f"{i}.jpg", b"x"), (f"{i}.json", b'{"alt": "another"}'))]
    (tmp_path / "x.tar").write_bytes(tar_bytes(files))
    with caplog.at_level(logging.WARNING):
        assert list(iter_captions([str(tmp_path / "x.tar")], ["{txt}"])) == [f"caption of {i}" for i in range(6)]
    assert len(caplog.records) == 1
    assert "4 left out: caption template '{txt}' names the field 'txt'" in caplog.text
    assert f"{tmp_path}/x.tar:6" in caplog.text
    assert "data.captions=" in caplog.text


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ([("a.txt", b"alone"), ("b.txt", b"alone")], "2 left out: no image"),
        ([("a.jpg", b"x"), ("a.json", b'{"alt": "y"}')], "names the field 'txt'.*data.captions"),
        ([], "holds no sample"),
    ],
)
def test_without_a_caption_the_real_cause_is_named(tmp_path: Path, files: list[tuple[str, bytes]], says: str) -> None:
    """A tar without images, or without the field, is not called one whose captions hold no words."""
    (tmp_path / "x.tar").write_bytes(tar_bytes(files))
    with pytest.raises(UserError, match=f"no caption in .*x.tar.*{says}"):
        list(iter_captions([str(tmp_path / "x.tar")], ["{txt}"]))


@pytest.mark.parametrize("name", ["caption", "text"])
def test_a_caption_in_json_alone_is_a_caption(tmp_path: Path, name: str) -> None:
    """KEY.jpg with KEY.json and no KEY.txt, as in DataComp, trains with the default template."""
    files = [
        f for i in range(4) for f in ((f"{i}.jpg", b"x"), (f"{i}.json", b'{"%s": "number %d"}' % (name.encode(), i)))
    ]
    (tmp_path / "x.tar").write_bytes(tar_bytes(files))
    assert list(iter_captions([str(tmp_path / "x.tar")], ["{txt}"])) == [f"number {i}" for i in range(4)]
