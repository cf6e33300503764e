"""Classification of images by the words of their captions (SuperClass, Huang et al. 2024; SuperCLIP, Zhao et al. 2025,
arXiv:2512.14480)."""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mmssl.distributed import World
from mmssl.models import DualEncoder
from mmssl.objectives import base
from mmssl.rng import RowRandom

COMMON = 1e-3
"""Weight of a token that every caption has, so that a caption of such tokens alone keeps a target."""


class WordsOptions(base.ObjectiveOptions):
    """Options of the classification by words."""

    weight: float = Field(0.1, ge=0)
    """Factor of its loss in the total."""
    idf: bool = True
    """Weight each token by its rarity among the captions seen so far (inverse document frequency)."""


class Words(base.Objective):
    """Cross-entropy between a linear prediction from the pooled image and the distinct tokens of the caption.

    The order and the number of repetitions of the tokens do not matter; the targets of a caption sum to 1. The numbers
    of captions with each token are counted over all processes and saved in checkpoints.
    """

    Options = WordsOptions

    def __init__(self, options: WordsOptions, encoder: DualEncoder, vocabulary: base.Vocabulary) -> None:
        super().__init__()
        self.options = options
        self.head = nn.Linear(encoder.vision.width, vocabulary.size)
        self.register_buffer("special", torch.tensor(vocabulary.special_ids), persistent=False)
        self.register_buffer("caption_count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("captions_with", torch.zeros(vocabulary.size, dtype=torch.int64))

    def sample_targets(self, inputs: base.Inputs, random: RowRandom, encoder: DualEncoder) -> dict[str, Tensor]:
        ordinary = inputs["token_mask"] & ~torch.isin(inputs["tokens"], self.get_buffer("special"))
        first = ordinary & ~repeated(inputs["tokens"])
        weights = first.float()
        if self.options.idf:
            frequency = self.get_buffer("captions_with")[inputs["tokens"]]
            weights = weights * (COMMON + ((1 + self.get_buffer("caption_count")) / (1 + frequency)).log())
        return {"words.weights": weights / weights.sum(1, keepdim=True).clamp(min=1e-12), "words.first": first}

    def num_terms(self, inputs: base.Inputs) -> Tensor:
        return inputs["words.first"].any(1).sum().float()

    @classmethod
    def alarms(cls, metrics: Mapping[str, float]) -> dict[str, str]:
        if math.isnan(metrics["loss"]):
            return {"words": "no caption had a word for objectives.words; are the captions empty?"}
        return {}

    def required_passes(self) -> tuple[base.EncoderPass, ...]:
        return (base.IMAGE,)

    def predict(self, features: base.Features, inputs: base.Inputs, encoder: DualEncoder) -> base.Predictions:
        return {"logits": self.head(features[base.IMAGE].pooled)}

    def loss(self, predictions: base.Predictions, inputs: base.Inputs, world: World) -> base.Output:
        logits, weights, first = predictions["logits"].float(), inputs["words.weights"], inputs["words.first"]
        # Sum over tokens of weight * -log softmax; without a matrix of targets as wide as the vocabulary.
        has_word = first.any(1)
        losses = logits.logsumexp(1) - (weights * logits.gather(1, inputs["tokens"])).sum(1)
        best = logits.detach().argmax(1, keepdim=True)
        hits = (first & (inputs["tokens"] == best)).any(1)
        return base.Output((losses * has_word).sum(), {"accuracy": (hits.sum(), has_word.sum())})

    def on_step_end(self, inputs: base.Inputs, world: World) -> None:
        if not self.options.idf:
            return
        first, counts = inputs["words.first"], self.get_buffer("captions_with")
        new = torch.zeros_like(counts).scatter_add(0, inputs["tokens"].flatten(), first.flatten().long())
        counts += world.sum(new)
        self.get_buffer("caption_count").add_(world.sum(first.any(1).sum()))


def repeated(tokens: Tensor) -> Tensor:
    """True for tokens that stand earlier in their row too, int64 [B, L] -> bool [B, L]."""
    ordered, order = tokens.sort(dim=1, stable=True)
    again = F.pad(ordered[:, 1:] == ordered[:, :-1], (1, 0))
    return torch.zeros_like(again).scatter(1, order, again)
