"""Images and captions on which exported files are compared with the model."""

from typing import Any

import torch
from torch import Tensor

from mmssl.errors import UserError
from mmssl.inference import Model
from mmssl.rng import torch_generator

CAPTIONS = ("a", "a red apple on a table", "two dogs run along the beach, seen from above", " ".join(["word"] * 200))


def images(model: Model, count: int = 3) -> Tensor:
    """Random pixels, uint8 [count, 3, S, S]."""
    side = model.vision.image_size
    return torch.randint(256, (count, 3, side, side), generator=torch_generator("export"), dtype=torch.uint8)


def normalized(model: Model, pixels: Tensor) -> Tensor:
    """Normalised images for other libraries: scaled to 0...1, minus the mean, divided by the deviation."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in model.vision.statistics)
    return (pixels / 255 - mean) / std


def largest_difference(found: Tensor, expected: Tensor) -> float:
    """The largest absolute difference of any entry, after normalising `found` to unit vectors."""
    found = torch.nn.functional.normalize(found.detach().float(), dim=-1)
    return float((found - expected).abs().max())


def missing_package(package: str, problem: ImportError) -> UserError:
    """The error for a missing package."""
    return UserError(f"this export needs {package} ({problem}); pip install 'mmssl[export]'")


def state(module: Any, prefix: str = "") -> dict[str, Tensor]:
    """The weights of a module on the CPU, contiguous; `prefix` stands before each name."""
    return {
        f"{prefix}{name}": tensor.detach().cpu().contiguous().clone() for name, tensor in module.state_dict().items()
    }
