"""A model behind mteb's interface of encoders, as mteb 2.26 has it."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from mmssl.errors import UserError
from mmssl.evaluate.metrics import composed
from mmssl.inference import Model, load

if TYPE_CHECKING:
    from mteb.models import ModelMeta


class MtebEncoder:
    """Encodes mteb's images, texts, and pairs of both as the sum of their unit vectors.

    Prompts of tasks are left out: they are instructions to language models.

    Attributes:
        mteb_model_meta: facts about the model, written into mteb's results.
    """

    def __init__(self, model: Model | str | Path, name: str | None = None) -> None:
        """Args:
            model: a model, or what `mmssl.load` takes.
            name: as ORGANISATION/NAME. Default: mmssl/ and the name of the model's folder.

        Raises:
            UserError: mteb is missing, the model does not exist, or the name has another form.
        """
        self.model = model if isinstance(model, Model) else load(model)
        place = self.model.folder if isinstance(model, Model) else Path(model)
        stem = "model" if place is None else (place.parent if place.name == "model" else place).resolve().name
        self.mteb_model_meta = _describe(self.model, f"mmssl/{stem}" if name is None else name)

    def encode(self, inputs: Iterable[Mapping[str, Any]], **options: Any) -> NDArray[np.float32]:
        """Unit vectors of all inputs, [N, D].

        Args:
            inputs: batches with `image` (PIL images), `text`, or both.
            options: mteb's; `show_progress_bar` alone has an effect.

        Raises:
            UserError: inputs are neither images nor texts.
        """
        from tqdm.auto import tqdm

        rows = []
        for batch in tqdm(inputs, disable=not options.get("show_progress_bar", False), desc="Encoding"):
            found = [self.model.encode_image(batch["image"])] if "image" in batch else []
            found += [self.model.encode_text(batch["text"])] if "text" in batch else []
            if not found:
                raise UserError(f"mteb's inputs have {', '.join(batch)}; this model encodes images and texts")
            rows.append(found[0] if len(found) == 1 else composed.compose(found[0], found[1]))
        return torch.cat(rows).numpy() if rows else np.empty((0, self.model.config.embed_dim), np.float32)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Cosines of all pairs of unit vectors, [N, M]."""
        return torch.as_tensor(embeddings1) @ torch.as_tensor(embeddings2).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Cosines of unit vectors row by row, [N]."""
        return (torch.as_tensor(embeddings1) * torch.as_tensor(embeddings2)).sum(dim=-1)


def _describe(model: Model, name: str) -> "ModelMeta":
    try:
        from mteb.models import ModelMeta
    except ImportError:
        raise UserError("mteb is missing: pip install 'mmssl[mteb]'") from None
    facts = {
        "loader": None,
        "name": name,
        # mteb keeps results by revision: another step of a run is another one.
        "revision": f"{model.image_fingerprint()[:16]}{model.text_fingerprint()[:16]}",
        "release_date": None,
        "languages": None,
        "n_parameters": sum(parameter.numel() for parameter in model.encoder.parameters()),
        "memory_usage_mb": None,
        "max_tokens": model.config.text.max_tokens,
        "embed_dim": model.config.embed_dim,
        "license": None,
        "open_weights": None,
        "public_training_code": None,
        "public_training_data": None,
        "framework": ["PyTorch"],
        "similarity_fn_name": "cosine",
        "use_instructions": False,
        "training_datasets": None,
        "modalities": ["image", "text"],
    }
    try:
        return ModelMeta(**facts)
    except ValueError as error:
        raise UserError(f"mteb refuses the description of this model: {error}") from None
