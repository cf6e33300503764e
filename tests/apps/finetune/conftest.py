"""A tiny model, and labelled images for it."""

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmssl import Model, load
from mmssl.apps.finetune import FineTuneData, gather
from mmssl.data.transforms import train_tokenizer
from mmssl.models import build_dual_encoder
from mmssl.rng import generator
from tests.helpers.models import tiny_model_config
from tests.helpers.tiny_runs import COLORS
from tests.helpers.toy_encoder import pack


def write_colors(home: Path, train: int = 48, test: int = 40) -> Path:
    """Noisy squares of four colours, labelled by .cls and in JSON by name, in CLIP_benchmark's layout."""
    rng = generator("colours")
    names = list(COLORS)
    for split, count in (("train", train), ("test", test)):
        records = []
        for index in range(count):
            name = names[index % 4]
            pixels = np.clip(np.array(COLORS[name]) + rng.normal(0, 60, (20, 20, 3)), 0, 255).astype(np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            records.append({"png": file.getvalue(), "cls": index % 4, "json": {"colour": name}})
        pack(home / split / "0.tar", records)
        (home / split / "nshards.txt").write_text("1")
    (home / "classnames.txt").write_text("\n".join(names) + "\n")
    return home


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dual encoder with random weights: its zero-shot accuracy is near chance."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    tokenizer = train_tokenizer([f"a photo of a {c}." for c in COLORS], 64, 77)
    config = tiny_model_config()
    Model(build_dual_encoder(config, tokenizer.vocab_size, tokenizer.pad_id), tokenizer, config).save(folder)
    return folder


@pytest.fixture(scope="session")
def colors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 images a class to train on, 10 to judge on."""
    return write_colors(tmp_path_factory.mktemp("colors") / "colors")


@pytest.fixture(scope="session")
def flat(colors: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One shard with no class names beside it."""
    folder = tmp_path_factory.mktemp("flat")
    shutil.copy(colors / "train" / "0.tar", folder / "images.tar")
    return folder / "images.tar"


@pytest.fixture
def model(model_folder: Path) -> Model:
    """Loaded anew for each test."""
    return load(model_folder)


@pytest.fixture
def problem(model: Model, colors: Path) -> FineTuneData:
    """The colours as the model sees them."""
    return gather(model, str(colors))
