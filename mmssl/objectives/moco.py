"""Contrast with a momentum encoder and a queue of its outputs (MoCo, He et al. 2019).

The positives are two views of an image, or (as in ALBEF, Li et al. 2021) an image and its caption.
"""

import copy

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmssl.config import ViewConfig
from mmssl.distributed import World
from mmssl.losses import moco
from mmssl.models import DualEncoder, heads
from mmssl.objectives import base
from mmssl.objectives.simclr import ViewOptions
from mmssl.rng import RowRandom

KEY_ROWS = 256
"""Number of samples per forward pass of the momentum encoder, which keeps no activations."""
SECOND_VIEW = base.EncoderPass("vision", "view.moco")


class MocoOptions(ViewOptions):
    """Options of the momentum encoder."""

    image: bool = True
    """Match a view of each image with the momentum encoder's vector of its main view."""
    image_text: bool = False
    """Match images and captions with the momentum encoder's vectors of each other."""
    queue: int = Field(65536, ge=1)
    """Number of earlier vectors kept as negatives; a multiple of the batch."""
    momentum: float = Field(0.999, ge=0, lt=1)
    """Momentum of the encoder's moving average."""
    temperature: float = Field(0.2, gt=0)
    """Temperature of the loss."""

    @model_validator(mode="after")
    def _check(self) -> "MocoOptions":
        if not self.image and not self.image_text:
            raise ValueError("objectives.moco: image and image_text are both false; set one, or drop the objective")
        return self


class Moco(base.Objective):
    """Match each query with its key among the queue.

    Each step, the momentum encoder is updated and encodes the keys, which enter the queue after the backward pass.
    The momentum encoder and the queues are saved in checkpoints.
    """

    Options = MocoOptions
    has_own_encoder = True

    def __init__(self, options: MocoOptions, encoder: DualEncoder, vocabulary: base.Vocabulary) -> None:
        super().__init__()
        self.options = options
        self.head = heads.mlp(encoder.vision.width, options.head_width, options.head_dim) if options.image else None
        self.slow = copy.deepcopy(self._followed(encoder)).requires_grad_(False)
        dims = {"image": options.head_dim} if options.image else {}
        if options.image_text:
            dims |= {"paired_image": encoder.embed_dim, "caption": encoder.embed_dim}
        self.kinds = tuple(dims)
        for kind, dim in dims.items():
            self.register_buffer(f"queue_{kind}", F.normalize(torch.randn(options.queue, dim), dim=1))
        self.register_buffer("next", torch.zeros((), dtype=torch.int64))

    def views(self) -> dict[str, ViewConfig]:
        return {"moco": self.options.view} if self.options.image else {}

    def sample_targets(self, inputs: base.Inputs, random: RowRandom, encoder: DualEncoder) -> dict[str, Tensor]:
        self._follow(encoder)
        rows = len(inputs["ids"])
        parts = [self._keys({k: v[a : a + KEY_ROWS] for k, v in inputs.items()}) for a in range(0, rows, KEY_ROWS)]
        return {f"moco.{kind}": torch.cat([part[kind] for part in parts]) for kind in self.kinds}

    def required_passes(self) -> tuple[base.EncoderPass, ...]:
        views = (SECOND_VIEW,) if self.options.image else ()
        return (*views, base.IMAGE, base.TEXT) if self.options.image_text else views

    def predict(self, features: base.Features, inputs: base.Inputs, encoder: DualEncoder) -> base.Predictions:
        queries = {}
        if self.head is not None:
            queries["image"] = heads.unit(self.head(features[SECOND_VIEW].pooled))
        if self.options.image_text:
            # The image is the query for a caption key, and vice versa.
            queries["caption"] = encoder.project_image(features[base.IMAGE].pooled)
            queries["paired_image"] = encoder.project_text(features[base.TEXT].pooled)
        return queries

    def loss(self, predictions: base.Predictions, inputs: base.Inputs, world: World) -> base.Output:
        losses, metrics = [], {}
        for kind in self.kinds:
            query, key, queue = predictions[kind], inputs[f"moco.{kind}"], self.get_buffer(f"queue_{kind}")
            losses.append(moco(query, key, queue, self.options.temperature)[0])
            with torch.no_grad():
                own = (query * key).sum(1)
                hits = own > (query @ queue.T).max(1).values
            metrics[f"{kind}_accuracy"] = (hits.sum(), float(len(query)))
        return base.Output(torch.stack(losses).sum(), metrics)

    def on_step_end(self, inputs: base.Inputs, world: World) -> None:
        position = self.get_buffer("next")
        for kind in self.kinds:
            keys, _ = world.gather(inputs[f"moco.{kind}"])
            keys = keys[-self.options.queue :]
            places = (position + torch.arange(len(keys), device=keys.device)) % self.options.queue
            self.get_buffer(f"queue_{kind}").index_copy_(0, places, keys)
        position.copy_((position + len(keys)) % self.options.queue)

    def _followed(self, encoder: DualEncoder) -> nn.ModuleDict:
        """The modules that the momentum encoder copies."""
        modules: dict[str, nn.Module] = {"vision": encoder.vision}
        if self.head is not None:
            modules["head"] = self.head
        if self.options.image_text:
            projections = {"image_projection": encoder.image_projection, "text_projection": encoder.text_projection}
            modules |= {"text": encoder.text, **projections}
        return nn.ModuleDict(modules)

    def _follow(self, encoder: DualEncoder) -> None:
        fast: list[Tensor] = list(self._followed(encoder).parameters())
        torch._foreach_lerp_(list[Tensor](self.slow.parameters()), fast, 1 - self.options.momentum)

    def _keys(self, inputs: base.Inputs) -> dict[str, Tensor]:
        slow = self.slow
        image = slow["vision"](inputs["view.main"]).pooled
        keys = {}
        if self.head is not None:
            keys["image"] = heads.unit(slow["head"](image))
        if self.options.image_text:
            text = slow["text"](inputs["tokens"], inputs["token_mask"]).pooled
            keys["paired_image"] = heads.unit(slow["image_projection"](image))
            keys["caption"] = heads.unit(slow["text_projection"](text))
        return keys
