"""Images with captions as a user has them: a CSV beside a folder, and settings that train on them in seconds."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmssl.rng import generator
from tests.helpers.models import TINY_TEXT
from tests.helpers.tiny_runs import COLORS

TINY: dict[str, Any] = {
    "model.vision.name": "timm:vit_tiny_patch16_224",
    "model.vision.image_size": 16,
    "model.vision.options": {"patch_size": 4, "depth": 1, "embed_dim": 32, "num_heads": 2},
    "model.text.config": {**TINY_TEXT, "num_hidden_layers": 1},
    "model.embed_dim": 16,
    "train.micro_batch": None,
    "train.precision": "fp32",
    "train.threads": 1,
    "train.trackers": [],
}


def write_table(folder: Path, count: int = 40) -> Path:
    """FOLDER/pairs.csv with paths and captions of plain noisy squares in FOLDER/photos."""
    rng = generator("table")
    (folder / "photos").mkdir(parents=True)
    with (folder / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "caption"])
        for number in range(count):
            name = list(COLORS)[number % len(COLORS)]
            pixels = np.clip(np.array(COLORS[name]) + rng.normal(0, 12, (20, 24, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "photos" / f"{number}.png")
            rows.writerow([f"photos/{number}.png", f"a {name} square, number {number}"])
    return folder / "pairs.csv"
