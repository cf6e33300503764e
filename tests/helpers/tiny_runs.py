"""Tiny image-caption shards and a run on them that takes seconds."""

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.helpers.models import TINY_TEXT

COLORS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "white": (250, 250, 250)}


def write_pairs(folder: Path) -> Path:
    """Two tars of 24 plain noisy images each, captioned with their colour, labels as .cls; with classnames.txt."""
    rng = np.random.default_rng(0)
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for i in range(24):
                label = int(rng.integers(len(COLORS)))
                name, color = list(COLORS.items())[label]
                pixels = np.clip(np.array(color) + rng.normal(0, 12, (20, 20, 3)), 0, 255).astype(np.uint8)
                image = io.BytesIO()
                Image.fromarray(pixels).save(image, "PNG")
                caption = f"a {name} square {i}".encode()
                for extension, data in {"png": image.getvalue(), "txt": caption, "cls": str(label).encode()}.items():
                    info = tarfile.TarInfo(f"s{shard}-{i:03d}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    (folder / "classnames.txt").write_text("\n".join(COLORS))
    return folder


def run_tree(shards: Path, run: Path, **changes: Any) -> dict[str, Any]:
    """The configuration of a run of a few seconds; `section__name=value` changes it."""
    options = {"patch_size": 4, "depth": 1, "embed_dim": 32, "num_heads": 2, "drop_path_rate": 0.1}
    text = {**TINY_TEXT, "num_hidden_layers": 1}
    tree: dict[str, Any] = {
        "run_dir": str(run),
        "data": {"train": str(shards / "*.tar"), "batch_size": 8, "workers": 1},
        "model": {
            "vision": {"name": "timm:vit_tiny_patch16_224", "image_size": 16, "options": options},
            "text": {"config": text, "tokenizer": "train", "vocab_size": 64, "pooling": "mean"},
            "embed_dim": 16,
        },
        "optim": {"lr": 2e-3},
        "train": {
            "steps": 8,
            "precision": "fp32",
            "checkpoint_steps": 3,
            "threads": 1,
            "ema": 0.9,
            "log_samples": True,
            "trackers": [],
        },
        "evaluate": {"suites": {"colors": {"data": str(shards / "*.tar")}}},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        tree[section] = {**tree[section], name: value} if name else value
    return tree
