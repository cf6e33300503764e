"""A small model, an index of 48 images, and the application over both."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from mmssl.apps.search import Index, embed_shards
from mmssl.apps.serve import create_app
from mmssl.data import expand, iter_samples
from mmssl.inference import Model
from mmssl.types import Sample
from tests.helpers.export_models import own
from tests.helpers.tiny_runs import write_pairs


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return expand([str(write_pairs(tmp_path_factory.mktemp("pairs")) / "*.tar")])


@pytest.fixture(scope="session")
def samples(shards: list[str]) -> list[Sample]:
    """The indexed images, by row."""
    return list(iter_samples(shards))


@pytest.fixture(scope="session")
def model() -> Model:
    return own()


@pytest.fixture(scope="session")
def index(model: Model, shards: list[str], tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder: Path = tmp_path_factory.mktemp("index") / "i"
    embed_shards(model, shards, folder)
    return Index(folder)


@pytest.fixture(scope="session")
def client(model: Model, index: Index) -> Iterator[TestClient]:
    with TestClient(create_app(model, index), base_url="http://localhost") as started:
        yield started
