"""Multi-label members of CLIP_benchmark against NumPy."""

import io

import numpy as np
import pytest

from mmssl.data import iter_samples
from mmssl.data.shards.samples import multi_hot_labels
from tests.helpers.toy_encoder import pack, paint


def npy(array: np.ndarray) -> bytes:
    """The file that `np.save` writes."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


@pytest.mark.parametrize("dtype", ["int64", "uint8", "float32", "bool"])
def test_ones_are_the_classes(dtype: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A `.npy` member of zeros and ones becomes the list of its ones; a list in the .json comes first."""
    array = (np.random.default_rng(0).random(20) < 0.3).astype(dtype)
    records = [{"png": paint(1), "npy": npy(array)}, {"png": paint(2), "npy": npy(array), "json": {"labels": [3]}}]
    shard = pack(tmp_path_factory.mktemp("s") / "0.tar", records)
    first, second = (sample.fields["labels"] for sample in iter_samples([str(shard)], need_text=False))
    assert (first, second) == (np.flatnonzero(array).tolist(), [3])


@pytest.mark.parametrize(
    "content",
    [
        npy(np.random.default_rng(0).normal(size=512)),
        npy(np.zeros((2, 3))),
        npy(np.array([{}], dtype=object)),
        npy(np.array(["a"])),
        npy(np.zeros(10))[:90],
        b"",
        b"\x93NUMPY\x01\x00\x76\x00" + b"{'descr': __import__('os')}".ljust(117) + b"\n",
        npy(np.zeros(1 << 17)),
    ],
)
def test_other_arrays_are_no_labels(content: bytes) -> None:
    """Embeddings, matrices, pickled objects, damaged and huge files are left alone."""
    assert multi_hot_labels(content) is None
