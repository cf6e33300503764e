"""Objectives' pictures, as a file a person looks at."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmssl.objectives.base import Inputs
from mmssl.objectives.mixer import Mixer

ROWS = 8
"""Samples shown."""


@torch.no_grad()
def objective_pictures(mixer: Mixer, inputs: Inputs, active: list[str], accelerator: Any) -> dict[str, Tensor]:
    """Objective -> uint8 [rows, columns, 3, H, W], for those that have something to show."""
    rows = {name: tensor[:ROWS] for name, tensor in inputs.items()}
    training = mixer.training
    mixer.eval()
    with accelerator.autocast():
        predictions = mixer.predict(rows, active)
    shown = {name: mixer.objective(name).pictures(predictions[name], rows, mixer.encoder) for name in active}
    mixer.train(training)
    return {name: pictures for name, pictures in shown.items() if pictures is not None}


def write_sheet(path: Path, pictures: Tensor) -> None:
    """Write uint8 [rows, columns, 3, H, W] as one PNG, a row a sample."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows, columns, _, height, width = pictures.shape
    sheet = pictures.permute(0, 3, 1, 4, 2).reshape(rows * height, columns * width, 3)
    Image.fromarray(sheet.cpu().numpy()).save(path)
