"""Detection of replaced tokens."""

import pytest
import torch
from sklearn.metrics import roc_auc_score
from transformers import ElectraConfig, ElectraForPreTraining

from mmssl.distributed import World
from mmssl.models import build_dual_encoder
from mmssl.objectives.replaced_tokens import ReplacedTokens, ReplacedTokensOptions, ranking
from mmssl.rng import RowRandom
from tests.helpers.models import tiny_model_config
from tests.helpers.objective_batch import ROWS, WORDS, batch, tiny_task, vocabulary

ELECTRA = {
    "model_type": "electra",
    "embedding_size": 32,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def test_the_loss_is_that_of_electra() -> None:
    """With the same weights, the loss and its gradients in the embeddings, the tower and the head are those of
    transformers' ElectraForPreTraining, padding left out."""
    task = tiny_task(["replaced_tokens"], text=ELECTRA)
    objective = task.objective("replaced_tokens")
    assert isinstance(objective, ReplacedTokens)
    random = RowRandom(torch.Generator().manual_seed(1), 0, ROWS, ROWS)
    inputs = task.inputs(batch(task), ["replaced_tokens"], lambda _: random, 0.0)
    assert not inputs["token_mask"].all()
    output = objective.loss(task.predict(inputs, ["replaced_tokens"])["replaced_tokens"], inputs, World())
    ours = output.total / objective.num_terms(inputs)
    tower = task.encoder.text.encoder
    sizes = {k: v for k, v in ELECTRA.items() if k != "model_type"}
    peer = ElectraForPreTraining(ElectraConfig(vocab_size=WORDS, **sizes))
    peer.electra.load_state_dict(tower.state_dict())
    head = peer.discriminator_predictions
    head.dense.load_state_dict(objective.head.dense.state_dict())
    head.dense_prediction.load_state_dict(objective.head.predict.state_dict())
    tokens, labels = inputs["replaced_tokens.tokens"], inputs["replaced_tokens.replaced"]
    theirs = peer(tokens, attention_mask=inputs["token_mask"].long(), labels=labels.long()).loss
    torch.testing.assert_close(ours, theirs)
    ours.backward()
    theirs.backward()
    expected = dict(peer.electra.named_parameters())
    for name, parameter in tower.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(objective.head.dense.weight.grad, head.dense.weight.grad)


def objective_of(ratio: float) -> tuple[ReplacedTokens, object]:
    encoder = build_dual_encoder(tiny_model_config(), WORDS, 0)
    return ReplacedTokens(ReplacedTokensOptions(ratio=ratio), encoder, vocabulary()), encoder


def captions(rows: int, length: int) -> dict[str, torch.Tensor]:
    """Captions of words 10 to 13, of which 13 is as frequent as the others together, within special tokens."""
    g = torch.Generator().manual_seed(0)
    tokens = torch.tensor([10, 11, 12, 13, 13, 13])[torch.randint(6, (rows, length), generator=g)]
    mask = torch.arange(length) < torch.randint(3, length + 1, (rows, 1), generator=g)
    tokens[:, 0] = 1
    return {"tokens": tokens * mask, "token_mask": mask, "ids": torch.arange(rows)}


def test_replacements_follow_the_frequencies_of_the_captions() -> None:
    """At first every ordinary word is as likely; after captions have been seen, each is drawn as often as it stood
    there (5 standard errors, beside the one count that every word starts with). Special tokens and padding stay, and a
    token is marked exactly if it changed."""
    objective, encoder = objective_of(0.3)
    inputs = captions(3000, 16)
    for step in range(2):
        random = RowRandom(torch.Generator().manual_seed(step), 0, 3000, 3000)
        found = objective.sample_targets(inputs, random, encoder)
        new, replaced = found["replaced_tokens.tokens"], found["replaced_tokens.replaced"]
        assert torch.equal(replaced, new != inputs["tokens"])
        ordinary = inputs["token_mask"] & (inputs["tokens"] > 4)
        assert not (replaced & ~ordinary).any()
        assert new[ordinary].min() > 4
        # The count of every word begins with 1.
        weights = torch.bincount(inputs["tokens"][ordinary], minlength=WORDS).double() * step + 1
        weights[:5] = 0
        probability = weights / weights.sum()
        stayed = probability[inputs["tokens"][ordinary]]
        drawn = 0.3 * ordinary.sum()
        error = 5 * float((ordinary.sum() * 0.3 * 0.7) ** 0.5)
        assert abs(float(replaced.sum() - 0.3 * (1 - stayed).sum())) < error
        for word in (10, 13, 50):
            p = float(probability[word])
            expected = float(0.3 * p * (inputs["tokens"][ordinary] != word).sum())
            assert abs(int((new[replaced] == word).sum()) - expected) < 5 * (float(drawn) * p) ** 0.5 + 1
        objective.on_step_end(inputs, World())


def test_the_same_rows_at_any_padding() -> None:
    """A process that pads its captions less than another draws the same for its rows."""
    objective, encoder = objective_of(0.5)
    inputs = captions(6, 9)
    inputs["token_mask"][3:, 6:] = False

    def prepare(rows: slice, length: int) -> torch.Tensor:
        part = {name: x[rows] if x.ndim == 1 else x[rows, :length] for name, x in inputs.items()}
        random = RowRandom(torch.Generator().manual_seed(0), rows.start, rows.stop, 6)
        return objective.sample_targets(part, random, encoder)["replaced_tokens.tokens"]

    assert torch.equal(prepare(slice(0, 6), 9)[3:, :6], prepare(slice(3, 6), 6))


def test_the_first_guess_is_the_ratio() -> None:
    """Before training, the mean probability of a replacement is near the configured ratio."""
    task = tiny_task(["replaced_tokens"], options={})
    random = RowRandom(torch.Generator().manual_seed(1), 0, ROWS, ROWS)
    inputs = task.inputs(batch(task), ["replaced_tokens"], lambda _: random, 0.0)
    logits = task.predict(inputs, ["replaced_tokens"])["replaced_tokens"]["logits"]
    assert float(logits.detach().sigmoid().mean()) == pytest.approx(0.15, abs=0.08)


def test_the_ranking_of_one_caption_is_scikit_learns_auc() -> None:
    """Padding left out; with several captions, pairs within each are added up."""
    g = torch.Generator().manual_seed(0)
    logits, mask = torch.randn(3, 20, generator=g), torch.rand(3, 20, generator=g) < 0.8
    replaced = mask & (torch.rand(3, 20, generator=g) < 0.4)
    pairs = [ranking(*(x[i : i + 1] for x in (logits, replaced, mask & ~replaced))) for i in range(3)]
    for row, (right, count) in enumerate(pairs):
        seen = mask[row]
        assert float(right / count) == pytest.approx(roc_auc_score(replaced[row][seen], logits[row][seen]))
    whole = ranking(logits, replaced, mask & ~replaced)
    assert [int(x) for x in whole] == [sum(int(pair[k]) for pair in pairs) for k in (0, 1)]
