"""Detection of replaced tokens in captions (ELECTRA, Clark et al. 2020, arXiv:2003.10555, section 2)."""

import math

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mmssl.distributed import World
from mmssl.models import DualEncoder
from mmssl.objectives import base
from mmssl.rng import RowRandom

READ_TEXT = base.EncoderPass("text", "replaced_tokens.tokens", "token_mask")


class ReplacedTokensOptions(base.ObjectiveOptions):
    """Options of the detection of replaced tokens."""

    weight: float = Field(0.1, ge=0)
    """Factor of its loss in the total."""
    ratio: float = Field(0.15, gt=0, lt=1)
    """Probability that a token is replaced."""


class ReplacedTokens(base.Objective):
    """Tell for every token of a caption if it stood there or was replaced.

    Replacements are drawn by the frequencies of the tokens in the captions seen so far, special tokens aside, in place
    of ELECTRA's small generator, which would be a second text tower. A token that is replaced by itself counts as
    original. The frequencies are counted over all processes and saved in checkpoints.
    """

    Options = ReplacedTokensOptions

    def __init__(self, options: ReplacedTokensOptions, encoder: DualEncoder, vocabulary: base.Vocabulary) -> None:
        super().__init__()
        self.options = options
        self.most = vocabulary.max_tokens
        self.head = ReplacedTokensHead(encoder.text.width, options.ratio)
        special = torch.tensor(vocabulary.special_ids)
        counts = torch.ones(vocabulary.size, dtype=torch.int64)
        counts[special] = 0
        self.register_buffer("special", special, persistent=False)
        self.register_buffer("counts", counts)

    def sample_targets(self, inputs: base.Inputs, random: RowRandom, encoder: DualEncoder) -> dict[str, Tensor]:
        tokens, length = inputs["tokens"], inputs["tokens"].shape[1]
        # Drawn for the longest caption, because its length differs between processes.
        chance, place = random.uniform(self.most)[:, :length], random.uniform(self.most)[:, :length]
        chosen = self._ordinary(inputs) & (chance < self.options.ratio)
        # In float64: float32 cannot tell the sums of a large count apart.
        cumulative = self.get_buffer("counts").double().cumsum(0)
        drawn = torch.searchsorted(cumulative, place.double() * cumulative[-1], right=True)
        replaced = torch.where(chosen, drawn, tokens)
        return {"replaced_tokens.tokens": replaced, "replaced_tokens.replaced": replaced != tokens}

    def num_terms(self, inputs: base.Inputs) -> Tensor:
        return inputs["token_mask"].sum().float()

    def required_passes(self) -> tuple[base.EncoderPass, ...]:
        return (READ_TEXT,)

    def predict(self, features: base.Features, inputs: base.Inputs, encoder: DualEncoder) -> base.Predictions:
        tokens = features[READ_TEXT].tokens
        assert tokens is not None
        # Towers that pad captions return tokens of the padding too.
        return {"logits": self.head(tokens[:, : inputs["tokens"].shape[1]])}

    def loss(self, predictions: base.Predictions, inputs: base.Inputs, world: World) -> base.Output:
        logits, mask, replaced = predictions["logits"].float(), inputs["token_mask"], inputs["replaced_tokens.replaced"]
        losses = F.binary_cross_entropy_with_logits(logits, replaced.float(), reduction="none")
        said, kept = logits.detach() > 0, mask & ~replaced
        metrics = {
            "ranking": ranking(logits.detach(), replaced, kept),
            "found": ((said & replaced).sum(), replaced.sum()),
            "false_alarms": ((said & kept).sum(), kept.sum()),
        }
        return base.Output((losses * mask).sum(), metrics)

    def on_step_end(self, inputs: base.Inputs, world: World) -> None:
        counts = self.get_buffer("counts")
        new = torch.zeros_like(counts)
        new.scatter_add_(0, inputs["tokens"].flatten(), self._ordinary(inputs).flatten().long())
        counts += world.sum(new)

    def _ordinary(self, inputs: base.Inputs) -> Tensor:
        return inputs["token_mask"] & ~torch.isin(inputs["tokens"], self.get_buffer("special"))


class ReplacedTokensHead(nn.Module):
    """ELECTRA's head: a layer and one logit per token. It begins with the probability of a replacement."""

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        self.dense, self.predict = nn.Linear(width, width), nn.Linear(width, 1)
        nn.init.constant_(self.predict.bias, math.log(ratio / (1 - ratio)))

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, L, width] -> logits [B, L]."""
        logits: Tensor = self.predict(F.gelu(self.dense(tokens))).squeeze(-1)
        return logits


def ranking(logits: Tensor, replaced: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs of a replaced and a kept token of one caption with the greater logit at the replaced one, and all pairs.

    All [B, L]. Their quotient is 0.5 by chance, whichever fraction is replaced.
    """
    pairs = replaced.unsqueeze(2) & kept.unsqueeze(1)
    right = logits.unsqueeze(2) > logits.unsqueeze(1)
    return (pairs & right).sum(), pairs.sum()
