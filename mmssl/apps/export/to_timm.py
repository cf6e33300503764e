"""Export of the vision tower alone, as weights for timm.create_model(..., checkpoint_path=FILE)."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import open_clip
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mmssl.apps.export import head
from mmssl.apps.export.reader import Reader, pillow, state
from mmssl.errors import UserError
from mmssl.inference import Model

if TYPE_CHECKING:
    from mmssl.apps.finetune import Classifier

LABEL = "timm"
CONFIG, WEIGHTS = "config.json", "model.safetensors"


def usage(folder: str) -> str:
    """Python code that loads the folder."""
    return f"""import json, pathlib, timm
settings = json.loads(pathlib.Path("{folder}/{CONFIG}").read_text())
model = timm.create_model(settings["architecture"], checkpoint_path="{folder}/{WEIGHTS}", **settings["model_args"])
model.eval()"""


def problems(model: Model) -> list[str]:
    """Vision towers that timm does not have."""
    if _architecture(model) is None:
        return [f"its vision tower is {model.config.vision.name}, which timm does not have"]
    return []


def write(model: Model, folder: Path) -> None:
    """Write model.safetensors, and config.json in the format of timm's hub folders."""
    record = {
        **settings(model),
        "num_classes": 0,
        "model_args": {"num_classes": 0, **settings(model)["model_args"]},
    }
    (folder / CONFIG).write_text(json.dumps(record, indent=1), encoding="utf-8")
    save_file(state(model.vision.trunk), folder / WEIGHTS)


def settings(model: Model) -> dict[str, Any]:
    """Architecture, arguments and preprocessing of the vision tower, under timm's names."""
    mean, std = model.vision.statistics
    side = model.vision.image_size
    return {
        "architecture": _architecture(model),
        "num_features": model.vision.width,
        "model_args": _arguments(model),
        "pretrained_cfg": {
            "input_size": [3, side, side],
            "interpolation": model.config.vision.interpolation,
            "crop_pct": 1.0,
            "crop_mode": "center" if model.config.vision.fit == "shortest" else "squash",
            "mean": mean,
            "std": std,
            "num_classes": 0,
        },
    }


def reader(model: Model, folder: Path) -> Reader:
    """timm's own loader and transform; the projection and the text tower are the model's."""
    record = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    theirs = timm.create_model(record["architecture"], checkpoint_path=folder / WEIGHTS, **record["model_args"]).eval()
    config = timm.data.resolve_data_config(pretrained_cfg=record["pretrained_cfg"])
    transform = timm.data.create_transform(**config, is_training=False)

    def encode(images: Sequence[bytes]) -> Tensor:
        pooled = theirs(torch.stack([transform(image) for image in pillow(images)]))
        return model.encoder.project_image(pooled.to(model.device))

    return Reader(encode, model.encode_text)


def write_classifier(classifier: "Classifier", folder: Path) -> head.Classify:
    """The head, with the projection that timm cannot store.

    Raises:
        UserError: the projection is an MLP.
    """
    projection = classifier.model.encoder.image_projection
    if not isinstance(projection, nn.Linear):
        raise UserError(
            "this classifier cannot be written as timm: its projection is not linear; choose another format"
        )
    theirs = reader(classifier.model, folder)
    return head.write_head(classifier, folder, theirs, projection=projection.weight.detach().cpu().contiguous())


def classifier_usage(folder: str) -> str:
    """Python code that classifies an image."""
    return head.usage(folder, 'torch.nn.functional.normalize(model(images) @ head["projection"].T)')


def _architecture(model: Model) -> str | None:
    """timm's name of the tower; None if timm does not have it."""
    library, _, name = model.config.vision.name.partition(":")
    if library == "timm":
        return name
    if model.vision.projects or type(model.vision.trunk).__module__.partition(".")[0] != "timm":
        return None
    settings = {**open_clip.get_model_config(name)["vision_cfg"], **model.config.vision.options}
    return str(settings["timm_model_name"])


def _arguments(model: Model) -> dict[str, Any]:
    options = dict(model.config.vision.options) if model.config.vision.name.startswith("timm:") else {}
    if hasattr(getattr(model.vision.trunk, "patch_embed", None), "img_size"):
        options["img_size"] = model.vision.image_size
    return options
