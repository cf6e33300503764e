"""Folders for transformers of dual encoders that it has no class for: two of its towers, joined by code beside them."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoModel, CLIPVisionModel, TimmWrapperConfig, TimmWrapperModel

from mmssl.apps.export import modeling_two_towers, to_timm
from mmssl.apps.export.clip_towers import clip_text, clip_vision, text_problems, vision_problems, write_preprocessing
from mmssl.apps.export.reader import save_tokenizer, state
from mmssl.inference import Model
from mmssl.models import OpenClipText

if TYPE_CHECKING:
    from mmssl.apps.finetune import Classifier

_CODE = Path(modeling_two_towers.__file__)
_CLASSES = {
    "AutoConfig": "TwoTowersConfig",
    "AutoModel": "TwoTowersModel",
    "AutoModelForZeroShotImageClassification": "TwoTowersModel",
    "AutoModelForImageClassification": "TwoTowersForImageClassification",
}


def problems(model: Model) -> list[str]:
    """Towers that transformers has no class for."""
    found = []
    if not takes_images(model):
        found.append(f"its vision tower {model.config.vision.name} is neither timm's nor CLIP's vision transformer")
    encoder = model.text.encoder
    if isinstance(encoder, OpenClipText):
        return found + text_problems(model)
    if AutoModel._model_mapping.get(type(encoder.config), None) is not type(encoder):
        found.append(f"AutoModel opens no {type(encoder).__name__}")
    if model.text.pad_to is not None:
        found.append("its text tower needs captions padded to their full length")
    return found


def takes_images(model: Model) -> bool:
    """Whether transformers has a class for the vision tower: timm's towers, and CLIP's vision transformer."""
    return not (to_timm.problems(model) and vision_problems(model))


def image_tower(model: Model) -> Any:
    """The vision tower as a model of transformers, which pools images as ours."""
    tower: Any
    if to_timm.problems(model):
        config, weights = clip_vision(model)
        tower = CLIPVisionModel(config)
        tower.load_state_dict(weights)
    else:
        tower = TimmWrapperModel(TimmWrapperConfig(**to_timm.settings(model)))
        tower.timm_model.load_state_dict(state(model.vision.trunk))
    return tower


def write(model: Model, folder: Path, classifier: "Classifier | None" = None) -> None:
    """config.json, model.safetensors, the tokenizer, preprocessor_config.json, and a copy of the code."""
    vision = image_tower(model)
    is_clip = isinstance(model.text.encoder, OpenClipText) or model.text.encoder.config.model_type == "clip_text_model"
    text, text_state = clip_text(model) if is_clip else (model.text.encoder.config, state(model.text.encoder))
    projections = model.encoder.image_projection, model.encoder.text_projection
    labels = {} if classifier is None else {"id2label": dict(enumerate(classifier.labels))}
    config = modeling_two_towers.TwoTowersConfig(
        vision_config=vision.config.to_dict(),
        text_config=text.to_dict(),
        widths=(model.vision.width, model.text.width),
        projections=(_kind(projections[0]), _kind(projections[1])),
        projection_dim=model.config.embed_dim,
        pooling=model.text.pooling,
        auto_map={auto: f"{_CODE.stem}.{name}" for auto, name in _CLASSES.items()},
        **labels,
    )
    kind = "TwoTowersModel" if classifier is None else "TwoTowersForImageClassification"
    theirs = getattr(modeling_two_towers, kind)(config)
    theirs.vision_model.load_state_dict(vision.state_dict())
    # Towers that pool otherwise have no pooling layer; AutoModel makes one.
    unused = theirs.text_model.state_dict().keys() - text_state.keys()
    zeros = {name: torch.zeros_like(theirs.text_model.state_dict()[name]) for name in unused}
    theirs.text_model.load_state_dict({**text_state, **zeros})
    theirs.visual_projection.load_state_dict(state(projections[0]))
    theirs.text_projection.load_state_dict(state(projections[1]))
    with torch.no_grad():
        theirs.logit_scale.copy_(model.encoder.log_logit_scale)
    if classifier is not None:
        theirs.classifier.load_state_dict({"weight": classifier.weight, "bias": classifier.bias})
    theirs.save_pretrained(folder)
    shutil.copy(_CODE, folder)
    save_tokenizer(model.tokenizer, folder)
    write_preprocessing(model, folder)
    # The processor that AutoProcessor takes, which the kind of the model does not say.
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "CLIPProcessor"}), encoding="utf-8")


def _kind(projection: nn.Module) -> str:
    return {nn.Linear: "linear", nn.Sequential: "mlp"}.get(type(projection), "none")
