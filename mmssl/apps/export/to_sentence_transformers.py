"""Export of both towers to a folder that SentenceTransformer loads."""

import tempfile
from pathlib import Path
from typing import Any

from torch import nn
from transformers import CLIPTextModel, CLIPVisionModel

from mmssl.apps.export import head
from mmssl.apps.export.clip_towers import clip_text, text_problems, write_preprocessing
from mmssl.apps.export.reader import Reader, missing_package, pillow, save_tokenizer, state
from mmssl.apps.export.two_towers import image_tower, takes_images
from mmssl.inference import Model
from mmssl.models import OpenClipText

LABEL = "sentence-transformers"
_POOLING = {"cls": "cls", "mean": "mean", "eos": "lasttoken"}


def usage(folder: str) -> str:
    """Python code that loads the folder."""
    return f"""from sentence_transformers import SentenceTransformer
model = SentenceTransformer("{folder}")
features = model.encode(["a red apple"])  # unit vectors; PIL images too, if the vision tower is timm's or CLIP's"""


def classifier_usage(folder: str) -> str:
    """Python code that classifies images."""
    return head.usage(folder, "model.encode(images, convert_to_tensor=True)")


def problems(model: Model) -> list[str]:
    """Kinds of pooling that sentence-transformers lacks."""
    if isinstance(model.text.encoder, OpenClipText):
        return text_problems(model)
    if model.text.pooling not in _POOLING:
        return [f"sentence-transformers does not pool captions by {model.text.pooling!r}"]
    return []


def write(model: Model, folder: Path) -> None:
    """Write each tower, its pooling, the projection as dense layers, and the normalisation.

    Images are left out if transformers has no class for the vision tower.
    """
    library, modules = _library()
    with tempfile.TemporaryDirectory() as place:
        text = _text_modules(model, modules, Path(place) / "text")
        image = _image_modules(model, modules, Path(place) / "image")
        routes = {(None, kind): kind for kind in ("text", "image")}
        parts = text if image is None else [modules.Router({"text": text, "image": image}, "text", True, routes)]
        library.SentenceTransformer(modules=parts, device="cpu").save(str(folder), create_model_card=False)


def reader(model: Model, folder: Path) -> Reader:
    """SentenceTransformer; images are the model's if the folder takes none."""
    theirs = _library()[0].SentenceTransformer(str(folder), device="cpu")

    def encode(inputs: Any) -> Any:
        return theirs.encode(inputs, convert_to_tensor=True, show_progress_bar=False)

    images = (lambda files: encode(pillow(files))) if takes_images(model) else model.encode_image
    return Reader(images, encode)


def _text_modules(model: Model, modules: Any, place: Path) -> list[Any]:
    encoder = model.text.encoder
    if isinstance(encoder, OpenClipText):
        config, weights = clip_text(model)
        encoder = CLIPTextModel(config)
        encoder.load_state_dict(weights)
    encoder.save_pretrained(place)
    save_tokenizer(model.tokenizer, place)
    words = modules.Transformer(str(place), max_seq_length=model.tokenizer.max_tokens)
    pooling = modules.Pooling(model.text.width, pooling_mode=_POOLING[model.text.pooling])
    return [words, pooling, *_dense(modules, model.encoder.text_projection), modules.Normalize()]


def _image_modules(model: Model, modules: Any, place: Path) -> list[Any] | None:
    if not takes_images(model):
        return None
    tower = image_tower(model)
    tower.save_pretrained(place)
    if isinstance(tower, CLIPVisionModel):
        write_preprocessing(model, place)
    pooled = {"image": {"method": "forward", "method_output_name": "pooler_output"}}
    eyes = modules.Transformer(str(place), modality_config=pooled, module_output_name="sentence_embedding")
    return [eyes, *_dense(modules, model.encoder.image_projection), modules.Normalize()]


def _dense(modules: Any, projection: nn.Module) -> list[Any]:
    """The linear layers of a projection as Dense modules."""
    parts = [projection] if isinstance(projection, nn.Linear) else [p for p in projection if isinstance(p, nn.Linear)]  # type: ignore[attr-defined]
    found = []
    for place, part in enumerate(parts):
        activation = nn.Identity() if place == len(parts) - 1 else nn.GELU()
        layer = modules.Dense(
            part.in_features, part.out_features, bias=part.bias is not None, activation_function=activation
        )
        layer.linear.load_state_dict(state(part))
        found.append(layer)
    return found


def _library() -> tuple[Any, Any]:
    """The package sentence-transformers and its modules."""
    try:
        import sentence_transformers
        from sentence_transformers.sentence_transformer import modules
    except ImportError as error:
        raise missing_package("sentence-transformers", error) from None
    return sentence_transformers, modules
