"""Masked language modelling of captions (BERT, Devlin et al. 2018, section 3.1), optionally with the image."""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mmssl.distributed import World
from mmssl.errors import UserError
from mmssl.losses import prediction
from mmssl.models import DualEncoder, TextTower
from mmssl.objectives import base
from mmssl.rng import RowRandom

MASKED_TEXT = base.EncoderPass("text", "mlm.tokens", "token_mask")
SPARE = 8
"""The last chosen word may exceed a caption's budget by this many tokens; further tokens stay unchanged."""


class MlmOptions(base.ObjectiveOptions):
    """Options of masked language modelling."""

    mask_ratio: float = Field(0.35, gt=0, lt=1)
    """Fraction of a caption's tokens to predict. BERT's 0.15 leaves a third of 20-token captions without a target."""
    whole_word: bool = True
    """Choose complete words, not pieces of them."""
    see_image: bool = False
    """Predict with cross-attention to the image's tokens."""


class Mlm(base.Objective):
    """Predict masked tokens, at least one per caption and never a special token.

    80 % of the chosen tokens become the mask token, 10 % a random one, 10 % stay.
    """

    Options = MlmOptions

    def __init__(self, options: MlmOptions, encoder: DualEncoder, vocabulary: base.Vocabulary) -> None:
        super().__init__()
        if vocabulary.mask_id is None:
            raise UserError(
                "objectives.mlm: the tokenizer has no mask token; add one to its tokenizer_config.json, learn one with "
                "model.text.tokenizer=train, or drop this objective"
            )
        self.options = options
        self.vocabulary = vocabulary
        self.head = MlmHead(encoder.text)
        self.image: CrossAttention | None = None
        if options.see_image:
            self.image = CrossAttention(encoder.text.width, encoder.vision.token_width or encoder.vision.width)
        words = vocabulary.continues_word if options.whole_word else torch.zeros_like(vocabulary.continues_word)
        self.register_buffer("continues_word", words, persistent=False)
        self.register_buffer("special", torch.tensor(vocabulary.special_ids), persistent=False)

    def sample_targets(self, inputs: base.Inputs, random: RowRandom, encoder: DualEncoder) -> dict[str, Tensor]:
        tokens, most = inputs["tokens"], self.vocabulary.max_tokens
        ordinary = inputs["token_mask"] & ~torch.isin(tokens, self.get_buffer("special"))
        continues = self.get_buffer("continues_word")[tokens]
        # Drawn for the maximum length: the longest caption of the batch differs between processes.
        scores, kind = random.uniform(most + 1), random.uniform(most)
        strangers = random.integers(self.vocabulary.size, most)
        length = tokens.shape[1]
        chosen = choose_words(ordinary, continues, scores[:, : length + 1], self.options.mask_ratio)
        corrupted = corrupt(tokens, chosen, kind[:, :length], strangers[:, :length], self.vocabulary.mask_id or 0)
        # A fixed number of places per caption, so that the host does not wait for the device.
        places = (~chosen).to(torch.uint8).argsort(dim=1, stable=True)
        places = places[:, : math.ceil(self.options.mask_ratio * length) + SPARE]
        targets = tokens.masked_fill(~chosen, prediction.NO_TARGET).gather(1, places)
        return {"mlm.tokens": corrupted, "mlm.places": places, "mlm.targets": targets}

    def num_terms(self, inputs: base.Inputs) -> Tensor:
        return (inputs["mlm.targets"] != prediction.NO_TARGET).sum().float()

    @classmethod
    def alarms(cls, metrics: Mapping[str, float]) -> dict[str, str]:
        if math.isnan(metrics["loss"]):
            return {"targets": "no caption had a token to mask for mlm; are the captions empty?"}
        return {}

    def required_passes(self) -> tuple[base.EncoderPass, ...]:
        return (MASKED_TEXT, base.IMAGE) if self.options.see_image else (MASKED_TEXT,)

    def predict(self, features: base.Features, inputs: base.Inputs, encoder: DualEncoder) -> base.Predictions:
        tokens = features[MASKED_TEXT].tokens
        assert tokens is not None
        places = inputs["mlm.places"].unsqueeze(-1).expand(-1, -1, tokens.shape[-1])
        hidden = tokens.gather(1, places)
        if self.image is not None:
            image = features[base.IMAGE]
            hidden = self.image(hidden, image.pooled.unsqueeze(1) if image.tokens is None else image.tokens)
        targets = inputs["mlm.targets"]
        if targets.device.type == "cpu":
            # Without such a wait, only the used places are computed; short captions use few.
            used = targets != prediction.NO_TARGET
            hidden, targets = hidden[used], targets[used]
        return {"logits": self.head(hidden, encoder.text.embedding), "targets": targets}

    def loss(self, predictions: base.Predictions, inputs: base.Inputs, world: World) -> base.Output:
        logits, targets = predictions["logits"], predictions["targets"]
        total, count = prediction.masked_language(logits, targets)
        hits = (logits.detach().argmax(-1) == targets).sum()
        return base.Output(total, {"accuracy": (hits, count)})


class MlmHead(nn.Module):
    """BERT's head: a layer, a norm, and the tower's own token embeddings as the decoder."""

    def __init__(self, tower: TextTower) -> None:
        super().__init__()
        vocabulary, width = tower.embedding.shape
        pretrained = tower.pretrained_mlm_head()
        if pretrained is not None:
            self.dense, self.norm = pretrained.dense, pretrained.norm
            self.bias = nn.Parameter(pretrained.bias.clone())
        else:
            self.dense, self.norm = nn.Linear(tower.width, width), nn.LayerNorm(width)
            self.bias = nn.Parameter(torch.zeros(vocabulary))

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        """[..., width] -> logits [..., vocabulary]."""
        return F.linear(self.norm(F.gelu(self.dense(hidden))), embedding, self.bias)


class CrossAttention(nn.Module):
    """Cross-attention from tokens to the image, with a residual connection."""

    def __init__(self, width: int, image_width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(
            width, max(1, width // 64), kdim=image_width, vdim=image_width, batch_first=True
        )

    def forward(self, tokens: Tensor, image: Tensor) -> Tensor:
        """[B, L, width] and [B, T, image_width] -> [B, L, width]."""
        found: Tensor = self.attention(self.norm(tokens), image, image, need_weights=False)[0]
        return tokens + found


def choose_words(ordinary: Tensor, continues: Tensor, scores: Tensor, ratio: float) -> Tensor:
    """The tokens to predict, bool [B, L]: words in random order up to `ratio` of a caption's ordinary tokens, at least
    one.

    Args:
        ordinary: bool [B, L], tokens that may be chosen.
        continues: bool [B, L], True for a token that belongs to the same word as the previous token.
        scores: uniform [B, L + 1], one per word.
    """
    word = (ordinary & ~continues).cumsum(1)
    scores = scores.gather(1, word).masked_fill(~ordinary, 2.0)
    ordered, order = scores.sort(dim=1, stable=True)
    place = torch.arange(scores.shape[1], device=scores.device)
    begins = torch.ones_like(ordinary)
    begins[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    word_begin = torch.where(begins, place, 0).cummax(1).values
    wanted = (ratio * ordinary.sum(1, keepdim=True)).round().clamp(min=1)
    taken = (word_begin < wanted) & (place < wanted + SPARE) & (ordered < 2.0)
    return torch.zeros_like(ordinary).scatter(1, order, taken)


def corrupt(tokens: Tensor, chosen: Tensor, kind: Tensor, strangers: Tensor, mask_id: int) -> Tensor:
    """Replace 80 % of the chosen tokens by `mask_id` and 10 % by a random id; all [B, L], `kind` uniform in [0, 1)."""
    masked = torch.where(chosen & (kind < 0.8), mask_id, tokens)
    return torch.where(chosen & (kind >= 0.8) & (kind < 0.9), strangers, masked)
