"""Batches from resized images: the same with any cache, in the order without one, from the originals read once."""

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmssl.config import ViewConfig
from mmssl.data import Source, TrainLoader
from mmssl.data.shards import SampleLimits, index_shards
from mmssl.data.shards.samples import parse_sample
from mmssl.data.storage import Access, LocalFiles
from mmssl.data.storage.resized import Shrunk, shrink
from mmssl.data.transforms import Renderer
from mmssl.data.transforms.views import View
from mmssl.errors import UserError
from mmssl.types import Batch
from tests.helpers.http_servers import Mischief, serve
from tests.helpers.images import encode, orientation, photo, psnr
from tests.helpers.tars import File, tar_bytes, toy_loader

LIMITS = SampleLimits()
FORM = Shrunk(40, LIMITS, 1_000_000)
SAMPLES = 24
"""Three batches of 8 an epoch."""
SMALL = 8
LARGE = SAMPLES - SMALL - 1
"""All others but one, which is broken."""


def npy(values: Sequence[int]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array(values))
    return buffer.getvalue()


def sample_bytes(*files: File) -> bytes:
    """The members of one sample, without the end marker."""
    return tar_bytes(files)[: sum(512 + -(-len(content) // 512) * 512 for _, content in files)]


def write_photographs(folder: Path, first: int = 0) -> list[str]:
    """Two shards of different parts of a photograph, every third one a small drawing, with a broken image between."""
    folder.mkdir(exist_ok=True)
    shards = []
    for shard in range(2):
        files: list[File] = []
        for number in range(shard, SAMPLES, 2):
            part = photo().crop((first + number, number, first + number + 160, number + 120))
            image = encode(part.resize((30, 30)), "PNG") if number % 3 == 0 else encode(part, "JPEG", quality=95)
            image = b"\xff\xd8\xff broken" if number == 5 else image
            files += [(f"{number:03}.jpg", image), (f"{number:03}.txt", f"caption {number}".encode())]
        path = folder / f"{shard:05}.tar"
        path.write_bytes(tar_bytes(files))
        shards.append(str(path))
    return shards


def loader(shards: Sequence[str], access: Access | None = None, **options: Any) -> TrainLoader:
    """Batches of 8 crops of 16 px."""
    render = Renderer({"main": View(ViewConfig(crop_scale=(0.5, 1.0)), 16)}, ["{txt}"], seed=0)
    options = {"access": access or Access(), "max_bad_fraction": 1.0, "lanes": 4, "slice_mib": 0.02, **options}
    return toy_loader([Source(shards)], render, **options)


def epochs(shards: Sequence[str], access: Access | None = None, count: int = 2, **options: Any) -> list[Batch]:
    """All batches of some epochs."""
    with loader(shards, access, **options) as stream:
        return [next(stream) for _ in range(count * stream.batches_per_epoch)]


def keeping(folder: Path, max_bytes: int = 1 << 30) -> Access:
    return Access.keeping(folder, max_bytes, FORM.side, LIMITS, FORM.max_pixels)


def assert_same(found: Sequence[Batch], expected: Sequence[Batch]) -> None:
    """Also of copies of the shards elsewhere, whose keys differ."""
    assert [batch.ids.tolist() for batch in found] == [batch.ids.tolist() for batch in expected]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.views["main"], other.views["main"])
        assert torch.equal(one.tokens, other.tokens)


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    return write_photographs(tmp_path / "shards")


def test_a_shrunk_sample_differs_in_its_large_images_alone() -> None:
    """Key, fields and small images stay. A large one is close to Pillow's resize of it, upright, over white."""
    turned = encode(photo(), "JPEG", quality=95, exif=orientation(6))
    clear = photo().convert("RGBA")
    clear.putalpha(128)
    small = encode(photo(40, 90), "PNG")
    beside = [
        ("d/a.json", b'{"title": "t"}'),
        ("d/a.txt", "é".encode()),
        ("d/a.cls", b"3"),
        ("d/a.npy", npy([0, 1, 1])),
    ]
    for images in ([("d/a.jpg", turned)], [("d/a.1.png", small), ("d/a.0.png", encode(clear, "PNG"))]):
        content = sample_bytes(*beside[:2], *images, *beside[2:], ("d/a.seg.png", b"other"))
        shrunk = shrink(content, FORM)
        assert shrunk is not None
        before, after = (parse_sample(7, "x.tar", members, LIMITS) for members in (content, shrunk))
        assert (after.id, after.key, after.fields) == (before.id, before.key, before.fields)
        assert len(after.more_images) == len(before.more_images) == len(images) - 1
        assert b"other" in shrunk
        assert after.more_images in ((), (small,))
        found = Image.open(io.BytesIO(after.image))
        expected = photo().rotate(-90, expand=True) if len(images) == 1 else Image.blend(photo(), _white(), 127 / 255)
        size = (40, 53) if len(images) == 1 else (53, 40)
        assert (found.format, found.size, found.getexif().get(0x0112, 1)) == ("JPEG", size, 1)
        assert psnr(np.array(found), np.array(expected.resize(size, Image.Resampling.BICUBIC))) > 30


def _white() -> Image.Image:
    return Image.new("RGB", photo().size, "white")


def test_what_cannot_be_shrunk_is_left_to_the_renderer() -> None:
    """Broken images and those above the limit of pixels are not kept, so that a batch names them as ever; neither is
    what is no sample."""
    good = ("a.txt", b"caption")
    assert shrink(sample_bytes(("a.jpg", b"\xff\xd8\xff broken"), good), FORM) is None
    assert shrink(sample_bytes(("a.jpg", encode(photo(), "JPEG")), good), Shrunk(40, LIMITS, 1000)) is None
    assert shrink(sample_bytes(good), FORM) is None
    assert shrink(b"x" * 512, FORM) is None


def test_batches_do_not_depend_on_the_cache(shards: list[str], tmp_path: Path) -> None:
    """Two epochs are the same from an empty cache, a filled one, a full one, one that is damaged in between, and with
    workers; their order is that without a cache."""
    cold = epochs(shards, keeping(tmp_path / "a"))
    assert [batch.ids.tolist() for batch in cold] == [batch.ids.tolist() for batch in epochs(shards)]
    assert not torch.equal(cold[0].views["main"], epochs(shards, count=1)[0].views["main"])
    assert_same(epochs(shards, keeping(tmp_path / "a")), cold)
    assert_same(epochs(shards, keeping(tmp_path / "full", max_bytes=1)), cold)
    assert_same(epochs(shards, keeping(tmp_path / "a"), workers=2), cold)
    assert_same(epochs(shards, keeping(tmp_path / "b"), workers=3), cold)
    kept = {path: path.read_bytes() for path in (tmp_path / "a").glob("*/*")}
    assert len(kept) == LARGE
    one, two, three = list(kept)[:3]
    one.write_bytes(kept[one][:100])
    two.write_bytes(kept[two][:1000] + bytes(1) + kept[two][1001:])
    three.unlink()
    assert_same(epochs(shards, keeping(tmp_path / "a")), cold)
    assert {path: path.read_bytes() for path in (tmp_path / "a").glob("*/*")} == kept, "renewed"


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_two_processes_fill_one_cache(shards: list[str], tmp_path: Path) -> None:
    """Worker processes and ranks that share a folder make the batches of one process, cold and warm."""
    expected = epochs(shards, keeping(tmp_path / "alone"))
    found = epochs(shards, keeping(tmp_path / "shared"), workers=2, worker_kind="process")
    assert_same(found, expected)
    ranks = [epochs(shards, keeping(tmp_path / "shared"), rank=rank, world_size=2) for rank in range(2)]
    for batch, parts in zip(expected, zip(*ranks, strict=True), strict=True):
        assert torch.equal(batch.views["main"], torch.cat([part.views["main"] for part in parts]))
    files = {folder: _files(tmp_path / folder) for folder in ("alone", "shared")}
    assert files["alone"] == files["shared"]


def _files(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*/*")}


def test_originals_are_read_once(shards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first epoch local shards are read for small and broken images alone; the bytes that are counted are
    those of the cache. A change of a shard in place is noticed by the next run."""
    read, reads = LocalFiles.read, dict[tuple[str, int], int]()

    def counted(self: LocalFiles, shard: str, start: int, stop: int) -> bytes:
        reads[shard, start] = stop - start
        return read(self, shard, start, stop)

    monkeypatch.setattr(LocalFiles, "read", counted)
    with loader(shards, keeping(tmp_path / "cache")) as stream:
        for _ in range(stream.batches_per_epoch):
            next(stream)
        assert len(reads) == SAMPLES
        before, most = stream.counters().bytes, sum(reads.values())
        reads.clear()
        for _ in range(stream.batches_per_epoch):
            next(stream)
        assert len(reads) == SAMPLES - LARGE
        assert 0 < stream.counters().bytes - before < 0.6 * most
    index_shards(shards, LIMITS)
    write_photographs(tmp_path / "shards", first=50)
    found = epochs(shards, keeping(tmp_path / "cache"))
    assert_same(found, epochs(shards, keeping(tmp_path / "other")))


def test_remote_samples_are_fetched_once(shards: list[str], tmp_path: Path) -> None:
    """Remote shards give the local batches; the second epoch asks the server for the broken sample alone."""
    index_shards(shards, LIMITS)
    expected, mischief = epochs(shards, keeping(tmp_path / "local"), count=3), Mischief()
    with serve(Path(shards[0]).parent, mischief) as url:
        urls = [f"{url}/{Path(shard).name}" for shard in shards]
        with loader(urls, keeping(tmp_path / "remote"), workers=2) as stream:
            found = [next(stream) for _ in range(3 * stream.batches_per_epoch)]
            asked = sum("bytes=" in request for request in mischief.requests)
        with loader(urls, keeping(tmp_path / "remote")) as again:
            assert_same([next(again) for _ in range(3)], expected[:3])
        assert sum("bytes=" in request for request in mischief.requests) - asked <= 2
    assert_same(found, expected)


def test_shards_without_an_index_are_not_resized(
    shards: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They are read as without the cache, and one line says so."""
    with serve(Path(shards[0]).parent) as url:
        urls = [f"{url}/{Path(shard).name}" for shard in shards]
        with loader(urls, keeping(tmp_path / "cache"), lanes=2) as resized, loader(urls, lanes=2) as plain:
            assert_same([next(resized)], [next(plain)])
    assert caplog.text.count("data.cache.resize is not used: without an index") == 1
    assert not list((tmp_path / "cache").iterdir())


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    """The error names the key and the folder."""
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data\.cache\.dir=.*file/cache cannot be created"):
        keeping(tmp_path / "file" / "cache")
