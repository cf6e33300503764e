"""Masked language modelling."""

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from mmssl.config import TextConfig
from mmssl.errors import UserError
from mmssl.losses.prediction import NO_TARGET
from mmssl.models import build_dual_encoder
from mmssl.models.text_factory import build_text
from mmssl.objectives._base import Vocabulary
from mmssl.objectives.mlm import SPARE, Mlm, MlmHead, MlmOptions, choose_words, corrupt
from mmssl.rng import RowRandom
from tests.helpers.models import TINY_TEXT, tiny_model_config
from tests.helpers.objective_batch import vocabulary

ROWS, LENGTH, WORDS, MASK = 400, 40, 1000, 4


def drawn(
    ratio: float, whole_word: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Captions of 3 to LENGTH tokens with [CLS] and [SEP], what continues words, and what the objective prepares."""
    encoder = build_dual_encoder(tiny_model_config(), WORDS, 0)
    continues = torch.arange(WORDS) % 3 == 0
    continues[:5] = False
    words = Vocabulary(WORDS, MASK, (0, 1, 2, 3, 4), continues, 64)
    objective = Mlm(MlmOptions(mask_ratio=ratio, whole_word=whole_word), encoder, words)
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, LENGTH + 1, (ROWS, 1), generator=g)
    mask = torch.arange(LENGTH) < lengths
    tokens = torch.randint(5, WORDS, (ROWS, LENGTH), generator=g)
    tokens[:, 0] = 2
    tokens.scatter_(1, lengths - 1, 3)
    tokens *= mask
    inputs = {"tokens": tokens, "token_mask": mask, "ids": torch.arange(ROWS)}
    return tokens, mask, continues, objective.sample_targets(inputs, RowRandom(g, 0, ROWS, ROWS), encoder)


def chosen_of(found: dict[str, torch.Tensor]) -> torch.Tensor:
    """Where there is a target, bool [ROWS, LENGTH]."""
    chosen = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    return chosen.scatter(1, found["mlm.places"], found["mlm.targets"] != NO_TARGET)


@pytest.mark.parametrize("ratio", [0.15, 0.35, 0.6])
def test_berts_rule(ratio: float) -> None:
    """Of the ordinary tokens the asked part is chosen; of those 80 % become the mask token, 10 % a random one,
    10 % stay (5 standard errors); the targets are the tokens that stood there; nothing else changes."""
    tokens, mask, _, found = drawn(ratio, whole_word=False)
    chosen, corrupted = chosen_of(found), found["mlm.tokens"]
    ordinary = mask & (tokens > 4)
    assert not (chosen & ~ordinary).any()
    assert torch.equal(corrupted[~chosen], tokens[~chosen])
    count = int(chosen.sum())
    # Rounding and the one target that every caption has lift the share a little.
    assert abs(count / int(ordinary.sum()) - ratio) < 0.02
    for part, hits in (
        (0.8, corrupted == MASK),
        (0.1, corrupted == tokens),
        (0.1, (corrupted != MASK) & (corrupted != tokens)),
    ):
        error = (part * (1 - part) / count) ** 0.5
        assert abs(int((hits & chosen).sum()) / count - part) < 5 * error + 1 / WORDS
    targets = found["mlm.targets"]
    kept = targets != NO_TARGET
    assert torch.equal(targets[kept], tokens.gather(1, found["mlm.places"])[kept])


def test_every_caption_has_a_target() -> None:
    """Also one of a single word at BERT's 15 %."""
    tokens, _, _, found = drawn(0.15)
    has_word = (tokens > 4).any(1)
    assert torch.equal((found["mlm.targets"] != NO_TARGET).any(1), has_word)


def test_whole_words_are_chosen() -> None:
    """All pieces of a word are chosen or none, unless the caption's budget and SPARE are used up."""
    tokens, mask, continues, found = drawn(0.35)
    chosen, ordinary = chosen_of(found), mask & (tokens > 4)
    for row in range(ROWS):
        if chosen[row].sum() >= 0.35 * ordinary[row].sum() + SPARE - 1:
            continue
        words: list[list[bool]] = []
        for place in ordinary[row].nonzero().flatten().tolist():
            if not words or not continues[tokens[row, place]]:
                words.append([])
            words[-1].append(bool(chosen[row, place]))
        assert all(len(set(word)) == 1 for word in words)


def test_words_go_in_the_order_of_their_scores() -> None:
    """By hand: two words of two and one tokens; half of three tokens is two, so the word with the lower score goes
    first, and the second is begun only if the budget is not met."""
    ordinary = torch.tensor([[False, True, True, True, False]])
    continues = torch.tensor([[False, False, True, False, False]])
    first = torch.tensor([[9.0, 0.1, 0.5, 0.9, 0.9, 0.9]])
    assert choose_words(ordinary, continues, first, 0.5).tolist() == [[False, True, True, False, False]]
    second = torch.tensor([[9.0, 0.5, 0.1, 0.9, 0.9, 0.9]])
    assert choose_words(ordinary, continues, second, 0.3).tolist() == [[False, False, False, True, False]]


def test_corruption_by_hand() -> None:
    """Below 0.8 the mask, to 0.9 the stranger, above it the token; tokens not chosen stay."""
    tokens, strangers = torch.tensor([[7, 7, 7, 7]]), torch.tensor([[9, 9, 9, 9]])
    kind, chosen = torch.tensor([[0.1, 0.85, 0.95, 0.1]]), torch.tensor([[True, True, True, False]])
    assert corrupt(tokens, chosen, kind, strangers, MASK).tolist() == [[MASK, 9, 7, 7]]


def test_the_same_rows_at_any_padding() -> None:
    """A process that pads its captions less than another draws the same for its rows."""
    encoder = build_dual_encoder(tiny_model_config(), 100, 0)
    objective = Mlm(MlmOptions(), encoder, vocabulary())
    tokens = torch.randint(5, 100, (6, 9))
    mask = torch.arange(9) < torch.tensor([[9], [9], [9], [5], [6], [4]])
    tokens = tokens * mask

    def prepare(rows: slice, length: int) -> dict[str, torch.Tensor]:
        inputs = {"tokens": tokens[rows, :length], "token_mask": mask[rows, :length], "ids": torch.arange(6)[rows]}
        random = RowRandom(torch.Generator().manual_seed(0), rows.start, rows.stop, 6)
        return objective.sample_targets(inputs, random, encoder)

    whole, part = prepare(slice(0, 6), 9), prepare(slice(3, 6), 6)
    assert torch.equal(whole["mlm.tokens"][3:, :6], part["mlm.tokens"])


def test_a_pretrained_head_is_used(tmp_path: Path) -> None:
    """The head of a saved BertForMaskedLM gives its logits; a folder without one gets a new head."""
    torch.manual_seed(0)
    sizes = {k: v for k, v in TINY_TEXT.items() if k != "model_type"}
    peer = BertForMaskedLM(BertConfig(vocab_size=50, **sizes)).eval()
    peer.cls.predictions.bias.data.normal_()
    peer.save_pretrained(tmp_path / "head")
    peer.bert.save_pretrained(tmp_path / "headless")
    tokens, mask = torch.randint(5, 50, (2, 7)), torch.ones(2, 7, dtype=torch.bool)
    towers = {name: build_text(TextConfig(name=str(tmp_path / name)), 50, 0).eval() for name in ("head", "headless")}
    hidden = towers["head"](tokens, mask).tokens
    expected = peer(input_ids=tokens, attention_mask=mask.long()).logits
    torch.testing.assert_close(
        MlmHead(towers["head"])(hidden, towers["head"].embedding), expected, rtol=1e-4, atol=1e-5
    )
    new = MlmHead(towers["headless"])
    assert new.bias.abs().max() == 0


def test_a_tokenizer_without_a_mask_token_is_refused() -> None:
    """The error says what to do."""
    encoder = build_dual_encoder(tiny_model_config(), 100, 0)
    words = Vocabulary(100, None, (0,), torch.zeros(100, dtype=torch.bool), 16)
    with pytest.raises(UserError, match=r"no mask token.*tokenizer_config\.json"):
        Mlm(MlmOptions(), encoder, words)
