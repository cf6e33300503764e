"""Next-token prediction of the caption given the image (CoCa, Yu et al. 2022, section 3.2)."""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mmssl.distributed import World
from mmssl.losses import prediction
from mmssl.models import DualEncoder
from mmssl.objectives import base


class CaptioningOptions(base.ObjectiveOptions):
    """Options of captioning."""

    depth: int = Field(2, ge=1)
    """Layers of the decoder, each with self-attention to earlier tokens and cross-attention to the image."""


class Captioning(base.Objective):
    """A separate causal decoder predicts the caption; it shares the text tower's token embeddings.

    In CoCa, the causal text tower is the lower half of the decoder. The encoders of this package are bidirectional and
    would see the answer.
    """

    Options = CaptioningOptions

    def __init__(self, options: CaptioningOptions, encoder: DualEncoder, vocabulary: base.Vocabulary) -> None:
        super().__init__()
        width = encoder.text.embedding.shape[1]
        heads = next(n for n in range(max(1, width // 64), 0, -1) if width % n == 0)
        self.position = nn.Parameter(torch.zeros(vocabulary.max_tokens, width).normal_(std=0.02))
        self.image = nn.Linear(encoder.vision.token_width or encoder.vision.width, width)
        layers = (
            nn.TransformerDecoderLayer(
                width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(options.depth)
        )
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(width)

    def num_terms(self, inputs: base.Inputs) -> Tensor:
        return inputs["token_mask"][:, 1:].sum().float()

    def required_passes(self) -> tuple[base.EncoderPass, ...]:
        return (base.IMAGE,)

    def predict(self, features: base.Features, inputs: base.Inputs, encoder: DualEncoder) -> base.Predictions:
        encoded, tokens, embedding = features[base.IMAGE], inputs["tokens"], encoder.text.embedding
        length = tokens.shape[1]
        image = self.image(encoded.pooled.unsqueeze(1) if encoded.tokens is None else encoded.tokens)
        x = F.embedding(tokens, embedding) + self.position[:length]
        causal = torch.ones(length, length, dtype=torch.bool, device=tokens.device).triu(1)
        for layer in self.layers:
            x = layer(x, image, tgt_mask=causal, tgt_is_causal=True)
        return {"logits": F.linear(self.norm(x), embedding)}

    def loss(self, predictions: base.Predictions, inputs: base.Inputs, world: World) -> base.Output:
        logits, tokens, mask = predictions["logits"], inputs["tokens"], inputs["token_mask"]
        total, count = prediction.next_token(logits, tokens, mask)
        hits = (logits.detach()[:, :-1].argmax(-1) == tokens[:, 1:]) & mask[:, 1:]
        return base.Output(total, {"accuracy": (hits.sum(), count)})
