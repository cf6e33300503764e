"""Export of the text tower to a folder that SentenceTransformer loads."""

import tempfile
from pathlib import Path
from typing import Any

from torch import nn
from transformers import CLIPTextModel

from mmssl.apps.export.probe_inputs import CAPTIONS, largest_difference, missing_package, state
from mmssl.apps.export.to_hf import clip_text, text_problems
from mmssl.inference import Model
from mmssl.models import OpenClipText

LABEL = "sentence-transformers"
_POOLING = {"cls": "cls", "mean": "mean", "eos": "lasttoken"}


def usage(folder: str) -> str:
    """Python code that loads the folder."""
    return f"""from sentence_transformers import SentenceTransformer
model = SentenceTransformer("{folder}")
features = model.encode(["a red apple"])  # unit vectors in the space of the images"""


def problems(model: Model) -> list[str]:
    """Kinds of pooling that sentence-transformers lacks."""
    if isinstance(model.text.encoder, OpenClipText):
        return text_problems(model)
    if model.text.pooling not in _POOLING:
        return [f"sentence-transformers does not pool captions by {model.text.pooling!r}"]
    return []


def write(model: Model, folder: Path) -> None:
    """Write the encoder, its pooling, the projection as dense layers, and the normalisation."""
    library, modules = _library()
    with tempfile.TemporaryDirectory() as place:
        encoder = model.text.encoder
        if isinstance(encoder, OpenClipText):
            config, weights = clip_text(model)
            encoder = CLIPTextModel(config)
            encoder.load_state_dict(weights)
        encoder.save_pretrained(place)
        model.tokenizer.save(Path(place))
        words = modules.Transformer(place, max_seq_length=model.tokenizer.max_tokens)
        pooling = modules.Pooling(model.text.width, pooling_mode=_POOLING[model.text.pooling])
        dense = _dense(modules, model.encoder.text_projection)
        parts = [words, pooling, *dense, modules.Normalize()]
        library.SentenceTransformer(modules=parts, device="cpu").save(str(folder), create_model_card=False)


def difference(model: Model, folder: Path) -> float:
    """Compare with SentenceTransformer."""
    theirs = _library()[0].SentenceTransformer(str(folder), device="cpu")
    found = theirs.encode(list(CAPTIONS), convert_to_tensor=True, show_progress_bar=False)
    return largest_difference(found, model.encode_text(list(CAPTIONS)))


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
