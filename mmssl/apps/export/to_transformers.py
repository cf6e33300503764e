"""Export to a folder for transformers' AutoModel: a CLIPModel if both towers have CLIP's architecture, else two towers
with code that joins them, which `trust_remote_code=True` loads."""

from pathlib import Path
from typing import TYPE_CHECKING

from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoProcessor,
    CLIPConfig,
    CLIPModel,
)

from mmssl.apps.export import two_towers
from mmssl.apps.export.clip_towers import clip_text, clip_vision, text_problems, vision_problems, write_preprocessing
from mmssl.apps.export.head import Classify
from mmssl.apps.export.reader import Reader, pillow, save_tokenizer, state
from mmssl.inference import Model

if TYPE_CHECKING:
    from mmssl.apps.finetune import Classifier

LABEL = "transformers"
_OLD_END = 2
"""With this end token, as in old configurations of CLIP, CLIPModel pools the token with the highest number."""


def usage(folder: str) -> str:
    """Python code that loads the folder."""
    return f"""from transformers import AutoModel, AutoProcessor, pipeline
model = AutoModel.from_pretrained("{folder}", trust_remote_code=True)  # get_image_features, get_text_features
processor = AutoProcessor.from_pretrained("{folder}", trust_remote_code=True)
ask = pipeline("zero-shot-image-classification", model="{folder}", trust_remote_code=True)"""


def classifier_usage(folder: str) -> str:
    """Python code that classifies an image."""
    return f"""from transformers import pipeline
classify = pipeline("image-classification", model="{folder}", trust_remote_code=True)
print(classify("photo.jpg"))"""


def problems(model: Model) -> list[str]:
    """Towers that transformers has no class for."""
    return two_towers.problems(model) if _not_clip(model) else []


def _not_clip(model: Model) -> bool:
    """Whether CLIPModel cannot express the model."""
    differ = model.config.projection != "linear" or bool(vision_problems(model) + text_problems(model))
    return differ or model.tokenizer.sep_id == _OLD_END


def write(model: Model, folder: Path) -> None:
    """config.json, model.safetensors, the tokenizer and preprocessor_config.json; code, if CLIPModel does not do."""
    if _not_clip(model):
        two_towers.write(model, folder)
        return
    text, text_state = clip_text(model)
    vision, vision_state = clip_vision(model)
    config = CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=model.config.embed_dim
    )
    theirs = CLIPModel(config)
    tensors = {f"text_model.{name}": tensor for name, tensor in text_state.items()}
    tensors |= {f"vision_model.{name}": tensor for name, tensor in vision_state.items()}
    tensors |= state(model.encoder.image_projection, "visual_projection.")
    tensors |= state(model.encoder.text_projection, "text_projection.")
    tensors["logit_scale"] = model.encoder.log_logit_scale.detach().cpu().reshape(())
    theirs.load_state_dict(tensors)
    theirs.save_pretrained(folder)
    save_tokenizer(model.tokenizer, folder)
    write_preprocessing(model, folder)


def reader(model: Model, folder: Path) -> Reader:
    """AutoModel and AutoProcessor."""
    theirs = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    return Reader(
        lambda images: theirs.get_image_features(**processor(images=pillow(images), return_tensors="pt")).pooler_output,
        lambda texts: (
            theirs.get_text_features(
                **processor(text=texts, padding=True, truncation=True, return_tensors="pt")
            ).pooler_output
        ),
    )


def write_classifier(classifier: "Classifier", folder: Path) -> Classify:
    """The model again with a head of labels, which AutoModelForImageClassification opens."""
    two_towers.write(classifier.model, folder, classifier)
    theirs = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    return lambda images: theirs(**processor(pillow(images), return_tensors="pt")).logits.softmax(-1)
