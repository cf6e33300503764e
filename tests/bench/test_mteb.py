"""mteb's evaluators and ours agree on the same model and data."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmssl.errors import UserError
from mmssl.evaluate import open_dataset
from tests.helpers.export_models import own
from tests.helpers.toy_encoder import pack, paint

pytest.importorskip("mteb")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
NAMES = ["red", "blue", "green", "cat", "dog", "apple", "boat"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """40 images of seven classes, two with each caption, and composed queries."""
    records = [{"png": paint(257 * (n % 7) * 31 + n, n), "cls": n % 7, "txt": f"thing {n // 2}"} for n in range(40)]
    pack(tmp_path / "set" / "test" / "0.tar", records)
    (tmp_path / "set" / "classnames.txt").write_text("\n".join(NAMES))
    queries = [{"reference": f"{n:05d}", "target": f"{n + 3:05d}", "txt": f"thing {n}"} for n in range(30)]
    (tmp_path / "set" / "queries.json").write_text(json.dumps(queries))
    return tmp_path / "set"


def test_every_metric_is_mtebs(folder: Path) -> None:
    """Zero-shot accuracy, recall of captions and images, of images by class and by composed queries, and V-measure
    equal mteb's, on tasks of mteb made from the same shard: to 1e-6, and recalls to the five decimals of mteb."""
    from scripts.bench.mteb import MAKERS, bench_mteb, suitable_tasks

    dataset = open_dataset(folder)
    assert suitable_tasks(dataset) == list(MAKERS)
    found = bench_mteb(own(), dataset, list(MAKERS))
    assert len(found) == 1 + 6 + 1 + 1 + 3
    for row in found:
        rounded = "recall" in row.metric  # mteb rounds metrics of retrieval to five decimals
        assert row.ours == pytest.approx(row.theirs, abs=5e-6 + 1e-9 if rounded else 1e-6), row
    assert len({round(row.ours, 6) for row in found}) > 5


def test_the_encoder_is_one_of_mtebs() -> None:
    """It has mteb's interface, encodes batches as the model does, and names itself by its weights."""
    from mteb.models import EncoderProtocol

    from mmssl.apps.mteb import MtebEncoder

    model = own()
    encoder = MtebEncoder(model, "lab/small")
    assert isinstance(encoder, EncoderProtocol)
    images = [Image.fromarray(np.full((20, 30, 3), value, np.uint8)) for value in (10, 120, 240)]
    batches: list[dict[str, Any]] = [{"image": images[:2]}, {"image": images[2:]}]
    assert np.allclose(encoder.encode(batches), model.encode_image(images).numpy(), atol=1e-6)
    both = encoder.encode([{"image": images, "text": ["red", "blue", "cat"]}])
    sums = model.encode_image(images) + model.encode_text(["red", "blue", "cat"])
    assert np.allclose(both, torch.nn.functional.normalize(sums, dim=-1).numpy(), atol=1e-6)
    assert torch.allclose(encoder.similarity(both, both).diagonal(), encoder.similarity_pairwise(both, both))
    meta = encoder.mteb_model_meta
    assert (meta.name, meta.embed_dim, meta.modalities) == ("lab/small", model.config.embed_dim, ["image", "text"])
    with torch.no_grad():
        model.encoder.image_projection.weight.add_(1)  # type: ignore[operator, union-attr]
    assert MtebEncoder(model, "lab/small").mteb_model_meta.revision != meta.revision
    with pytest.raises(UserError, match="inputs have audio"):
        encoder.encode([{"audio": [1]}])
    with pytest.raises(UserError, match="organization/model_name"):
        MtebEncoder(model, "small")
