"""The measurements of smaller embeddings and of bringing an index up to date."""

from pathlib import Path

from scripts.bench.storage import bench_storage
from scripts.bench.update import bench_update
from tests.helpers.export_models import own
from tests.helpers.toy_encoder import pack, paint


def test_full_embeddings_find_their_own_neighbours(tmp_path: Path) -> None:
    """float32 with all dimensions has recall 1 and 4 bytes per number; float16 and int8 have two and one, and find
    nearly as many; fewer dimensions find fewer."""
    shard = str(pack(tmp_path / "0.tar", [{"png": paint(4099 * n), "txt": f"square {n}"} for n in range(60)]))
    found = {recall.name: recall for recall in bench_storage(own(), [shard], [2])}
    full, half, byte = (found[f"{name}, 16 dimensions"] for name in ("float32", "float16", "int8"))
    assert (full.images, full.texts) == (1, 1)
    assert [full.bytes_per_image, half.bytes_per_image, byte.bytes_per_image] == [64, 32, 16]
    assert min(half.images, half.texts) > 0.9
    assert min(byte.images, byte.texts) > 0.7
    assert found["float32, 2 dimensions"].images < byte.images


def test_only_the_changed_shard_is_embedded(tmp_path: Path) -> None:
    """Of 100 images in 100 shards the model encodes all once, and one after each change."""
    shard = str(pack(tmp_path / "0.tar", [{"png": paint(4099 * n), "txt": "a"} for n in range(100)]))
    model, encoded = own(), list[int]()
    encode = model.encode_rendered
    model.encode_rendered = lambda images, *more: encoded.append(len(images)) or encode(images, *more)  # type: ignore
    found = bench_update(model, [shard], 100, 2)
    assert (sum(encoded), len(found.changed), len(found.unchanged)) == (102, 2, 2)
    assert "1 shard changed" in found.text()
